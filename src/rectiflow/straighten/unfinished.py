"""What there is of a shard that is being made, kept so that a kill costs seconds and no hours.

A part has its first row and the checksum of its bytes in its name, and so vouches for itself. Parts
are unfinished files like others: readers do not see them, and none is left in a finished store.
Parts that other versions of the libraries made have these in their name too, by their checksum, and
are passed over: a shard is made by one version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from rectiflow.straighten.folder import TEMPORARY, Folder, dump_json, sha256
from rectiflow.straighten.manifest import Manifest
from rectiflow.straighten.shard import DamagedShard, Shard


class Unfinished:
    """The parts of one shard.

    Args:
        folder: The store.
        manifest: Of the store.
        shard: Its number.
        versions: Of the libraries that make it, if they are not the manifest's.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        shard: int,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self._ending = f"-{sha256(dump_json(dict(versions)))[:8]}" if versions else ""
        self.indices = manifest.shard_range(shard)
        self._beginning = f"{TEMPORARY}part-{shard:06d}-"

    def load(self, names: set[str]) -> list[Shard]:
        """The parts there are, row after row from the shard's first; those that do not go on from
        there, or are damaged, are passed over.

        Args:
            names: Of what is in the folder.
        """
        parts: list[Shard] = []
        done = 0
        for row, count, checksum, name in sorted(self._parsed(names)):
            ends = (
                done + count == len(self.indices) or (done + count) % self.manifest.batch_size == 0
            )
            if row != done or count < 1 or not ends:
                continue
            data = self.folder.read(name)
            if data is None or sha256(data) != checksum:
                continue
            try:
                parts.append(Shard.from_bytes(data, self.manifest, count))
            except DamagedShard:
                continue
            done += count
        return parts

    def keep(self, row: int, part: Shard) -> None:
        """Keep the rows from `row` on.

        Raises:
            WorkError: The bytes did not arrive.
        """
        data = part.to_bytes()
        name = f"{self._beginning}{row:08d}-{len(part.x_1):08d}-{sha256(data)}{self._ending}"
        self.folder.write(name, data)

    def drop(self, names: set[str]) -> None:
        """Remove the parts: the shard is there."""
        self.folder.remove(name for name in names if name.startswith(self._beginning))

    def _parsed(self, names: set[str]) -> list[tuple[int, int, str, str]]:
        rest = r"(\d{8})-(\d{8})-([0-9a-f]{64})"
        pattern = re.compile(re.escape(self._beginning) + rest + re.escape(self._ending))
        found = ((pattern.fullmatch(name), name) for name in names)
        return [(int(m[1]), int(m[2]), m[3], name) for m, name in found if m is not None]


def joined(parts: list[Shard]) -> Shard:
    """One shard of the rows of several."""
    starts = [part.x_0 for part in parts if part.x_0 is not None]
    return Shard(
        torch.cat([part.x_1 for part in parts]),
        torch.cat([part.cost for part in parts]),
        torch.cat(starts) if starts else None,
    )
