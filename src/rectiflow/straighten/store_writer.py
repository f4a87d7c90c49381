"""Writing a store of pairs: one writer of possibly several, that may be killed at any moment.

Shard s belongs to writer `s % num_workers`, and nothing else is agreed between writers: each makes
the shards of its own that are missing or damaged, and whoever sees all shards there says so in
`complete.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rectiflow.errors import InputError, WorkError
from rectiflow.models.identity import difference
from rectiflow.stopping import Request, on_request
from rectiflow.straighten.folder import TEMPORARY, Folder, dump_json
from rectiflow.straighten.manifest import (
    COMPLETE,
    MANIFEST,
    PROMPTS,
    Manifest,
    hash_prompts,
    pack_prompts,
    read_manifest,
    shard_name,
    sidecar_name,
    unpack_prompts,
)
from rectiflow.straighten.pair_source import Source
from rectiflow.straighten.shard import DamagedShard, read_shard, read_sidecar, shard_of, write_shard
from rectiflow.straighten.unfinished import Unfinished, joined

Report = Callable[[str], None]


@dataclass(frozen=True)
class PairProgress:
    """How far a writer is."""

    done: int
    """Pairs of this writer that are there, made now or before."""
    total: int
    """Pairs of this writer in all."""
    made: int
    """Pairs that went through the network in this sitting."""
    bytes: int
    """Of the shards that are there, sidecars included."""


@dataclass
class StoreWriter:
    """One writer of a store.

    Args:
        folder: The store.
        manifest: What it is made with.
        worker: Which writer this is, from 0.
        num_workers: How many there are.
        keep_seconds: How often the pairs of a shard that is being made are kept.
        progress: Called after every batch, and every shard that is there.
        on_event: Told what there is to tell: shards that are damaged, and what is done about it.
        versions: Of the libraries that are installed; those of the manifest if None.
        other_versions: Make shards also where these are others than the manifest's.
    """

    folder: Folder
    manifest: Manifest
    worker: int = 0
    num_workers: int = 1
    keep_seconds: float = 30.0
    progress: Callable[[PairProgress], None] | None = None
    on_event: Report | None = None
    versions: Mapping[str, str] | None = None
    other_versions: bool = False
    made: int = field(default=0, init=False)
    """Pairs made by this writer."""
    done: int = field(default=0, init=False)
    """Pairs of this writer's shards that are there."""
    bytes: int = field(default=0, init=False)
    """Of this writer's shards and sidecars."""
    remade: list[str] = field(default_factory=list, init=False)
    """Shards that were damaged."""
    _request: Request = field(default_factory=Request, init=False)

    @property
    def shards(self) -> range:
        """The numbers of this writer's shards."""
        return range(self.worker, self.manifest.num_shards, self.num_workers)

    @property
    def total(self) -> int:
        """Pairs of this writer's shards."""
        return sum(len(self.manifest.shard_range(shard)) for shard in self.shards)

    def write(self, prompts: Sequence[str], source: Source) -> bool:
        """Make what is missing of this writer's shards.

        Args:
            prompts: Those of the manifest.
            source: What makes pairs.

        Returns:
            Whether the whole store is there, other writers' shards included.

        Raises:
            InputError: Something is to be made, and other versions are installed than the store was
                begun with.
            WorkError: A file could not be written, or a pair could not be made.
            Stopped: A signal asked to stop; the pairs made so far are kept.
        """
        with on_request() as self._request:
            return self._write(prompts, source)

    def _write(self, prompts: Sequence[str], source: Source) -> bool:
        names = self.folder.names()
        mine = {name for s in self.shards for name in (shard_name(s), sidecar_name(s))}
        if not mine <= names:
            self._check_versions()
            self.folder.check_writable()
        missing = [shard for shard in self.shards if not self._is_there(shard, names)]
        if missing:
            self._check_versions()
        self._write_prompts(prompts)
        self.folder.remove(self.folder.temporaries(names, mine))
        for shard in missing:
            self._request.heed()
            self._make(shard, source, names)
            self._unfinished(shard).drop(self.folder.names())
        return self._complete()

    @property
    def _others(self) -> dict[str, str] | None:
        """What makes shards here, if that is not what the store was begun with."""
        if self.versions is None or self.versions == self.manifest.versions:
            return None
        return dict(self.versions)

    def _check_versions(self) -> None:
        if self._others is None or self.other_versions:
            return
        begun = self.manifest.versions
        name, now = next((n, v) for n, v in self._others.items() if v != begun[n])
        raise InputError(
            f"{self.folder.uri} was begun with {name} {begun[name]}, and {now} is installed: "
            f"install {name}=={begun[name]}, or let this version make what is missing with "
            "--allow-other-versions (other_versions=True), which each of its shards will say"
        )

    def _unfinished(self, shard: int) -> Unfinished:
        return Unfinished(self.folder, self.manifest, shard, self._others)

    def _write_prompts(self, prompts: Sequence[str]) -> None:
        data = self.folder.read(PROMPTS)
        if data is not None:
            try:
                known = hash_prompts(unpack_prompts(data, PROMPTS))
            except InputError:
                known = ""
            if known == self.manifest.prompts_sha256:
                return
            self._tell(f"{PROMPTS} is damaged: writing it again")
        self.folder.write(PROMPTS, pack_prompts(prompts))

    def _is_there(self, shard: int, names: set[str]) -> bool:
        """Whether a shard is there and sound; it is read for that."""
        self._request.heed()
        if not {shard_name(shard), sidecar_name(shard)} <= names:
            return False
        try:
            found = read_shard(self.folder, self.manifest, shard)
        except DamagedShard as error:
            self._tell(f"{shard_name(shard)} is damaged ({error}): making it again")
            self.remade.append(shard_name(shard))
            return False
        if found is None:
            return False
        self._count(len(found[0].x_1), found[1].size + len(found[1].to_bytes()))
        return True

    def _make(self, shard: int, source: Source, names: set[str]) -> None:
        indices = self.manifest.shard_range(shard)
        inverted = self.manifest.kind == "inverted"
        unfinished = self._unfinished(shard)
        parts = unfinished.load(names)
        kept = sum(len(part.x_1) for part in parts)
        starts = [source.noise(indices[:kept])] if kept and not inverted else []
        self._count(kept, 0)
        last, kept_parts = time.monotonic(), len(parts)
        for row in range(kept, len(indices), self.manifest.batch_size):
            batch = indices[row : row + self.manifest.batch_size]
            try:
                x_0, x_1 = source.pairs(batch)
            except WorkError as error:
                raise WorkError(f"pairs {batch[0]} to {batch[-1]}: {error}") from error
            part = shard_of(x_0, x_1, keep_x_0=inverted)
            if not all(torch.isfinite(t).all() for t in (part.x_1, part.cost)):
                raise WorkError(
                    f"pairs {batch[0]} to {batch[-1]}: latents that float16 cannot hold"
                )
            parts.append(part)
            if not inverted:
                starts.append(x_0)
            self.made += len(batch)
            self._count(len(batch), 0)
            end = row + len(batch)
            due = time.monotonic() - last >= self.keep_seconds or self._request.asked
            if due and end < len(indices):
                unfinished.keep(kept, joined(parts[kept_parts:]))
                last, kept, kept_parts = time.monotonic(), end, len(parts)
                self._request.heed()
        whole = joined(parts)
        x_0 = whole.x_0.float() if whole.x_0 is not None else torch.cat(starts)
        sidecar = write_shard(self.folder, shard, whole, indices[0], x_0, self._others)
        self._count(0, sidecar.size + len(sidecar.to_bytes()))

    def _complete(self) -> bool:
        """Say that the store is complete, if it is, and tidy up."""
        names = self.folder.names()
        shards = range(self.manifest.num_shards)
        if not {name for s in shards for name in (shard_name(s), sidecar_name(s))} <= names:
            return False
        checksums: dict[str, str] = {}
        others: dict[str, dict[str, str]] = {}
        for shard in shards:
            try:
                sidecar = read_sidecar(self.folder, self.manifest, shard)
            except DamagedShard as error:
                self._tell(f"{error}: its writer has to run again")
                return False
            if sidecar is None:
                return False
            checksums[shard_name(shard)] = sidecar.sha256
            if sidecar.versions is not None:
                others[shard_name(shard)] = sidecar.versions
        said = {"num": self.manifest.num, "shards": checksums}
        data = dump_json(said | ({"other_versions": others} if others else {}))
        if self.folder.read(COMPLETE) != data:
            self.folder.write(COMPLETE, data)
        self.folder.remove(name for name in self.folder.names() if name.startswith(TEMPORARY))
        return True

    def _count(self, pairs: int, size: int) -> None:
        self.done += pairs
        self.bytes += size
        if self.progress is not None:
            self.progress(PairProgress(self.done, self.total, self.made, self.bytes))

    def _tell(self, text: str) -> None:
        if self.on_event is not None:
            self.on_event(text)


def existing_manifest(folder: Folder) -> Manifest | None:
    """The manifest of the store that is begun in a folder; None if the folder is free for one.

    Raises:
        InputError: Something else is in the folder, or the manifest is damaged.
    """
    names = folder.names()
    if MANIFEST in names:
        return read_manifest(folder)
    others = sorted(name for name in names if not name.startswith(TEMPORARY))
    if others:
        raise InputError(
            f"{folder.uri} holds something else than a store of pairs ({others[0]}): choose an "
            "empty folder, or one that is not there yet"
        )
    return None


def check_same(folder: Folder, found: Manifest, wanted: Manifest, name: str) -> None:
    """Refuse to go on with a store under settings that it was not begun with.

    Args:
        folder: The store.
        found: Its manifest.
        wanted: What is asked for.
        name: Of the teacher, as it was given.

    Raises:
        InputError: Names the first setting that differs, with both values.
    """
    for setting in _COMPARED:
        had, now = getattr(found, setting), getattr(wanted, setting)
        if setting == "identity":
            if words := difference(had, now, "the store", name):
                raise InputError(
                    f"{folder.uri} was begun with the same weights as another field ({words}): put "
                    "that back, or give another address"
                )
        elif had != now:
            raise InputError(f"{folder.uri} {_difference(setting, had, now, found)}")


# Those that explain others come first: a network in another dtype has other weights. The name is
# left out: a model is the same whatever its folder is called; and versions, which can be accepted.
_COMPARED = (
    *("kind", "dtype", "weight_hash", "family", "prompts_sha256", "images_sha256"),
    *("num", "shard_size", "batch_size", "solver", "identity", "num_inference_steps"),
    *("guidance_scale", "negative_prompt", "height", "width", "latent_shape", "base_seed"),
    *("device", "threads", "num_prompts"),
)


def _difference(name: str, had: Any, now: Any, found: Manifest) -> str:
    where = "give the same, or another address"
    match name:
        case "weight_hash":
            return (
                f"is of another teacher, {found.model} with weight_hash {had[:12]}, and this one "
                f"has {now[:12]}: {where}"
            )
        case "prompts_sha256":
            return (
                f"was begun with another prompt list, of {found.num_prompts} prompts with "
                f"prompts_sha256 {had[:12]}, and this one has {now[:12]}: {where}"
            )
        case "num" if now > had:
            return (
                f"was begun with num {had}, and {now} are asked for: a store keeps its size; make "
                f"the other {now - had} at another address with seed {found.base_seed + had}"
            )
    return f"was begun with {name} {had!r}, and {now!r} is asked for: {where}"
