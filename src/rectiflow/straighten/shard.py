"""One shard of a store: a safetensors file of pairs and a JSON sidecar that vouches for it.

`shard-000000.safetensors` has `x_1` float16 [n, C, h, w] and `cost` float32 [n], the mean of
`(x_1 - x_0)²` over the dimensions of a pair; in a store of inverted pairs also `x_0` float16. There
is no metadata in it, because safetensors writes several keys of it in a random order: that is what
the sidecar is for. It is written after the shard, so that a shard with its sidecar is a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rectiflow.guarded import Unreadable, parse_json
from rectiflow.straighten.folder import Folder, dump_json, sha256
from rectiflow.straighten.manifest import Manifest, shard_name, sidecar_name


class Statistics(BaseModel):
    """Of a shard's latents, as they are stored, and of their cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    std: float
    min: float
    max: float
    cost_mean: float
    cost_max: float


class Sidecar(BaseModel):
    """What a shard must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int
    """The index of its first pair."""
    count: int
    """Its pairs."""
    size: int
    """Bytes of the shard's file."""
    sha256: str
    """Of the shard's file."""
    x_0_sha256: str
    """Of the float32 bytes of its x_0, little-endian, row after row; of inverted pairs, of the
    float16 x_0 in the file, as float32. PyTorch does not promise the same random numbers in every
    release; this tells."""
    statistics: Statistics
    versions: dict[str, str] | None = None
    """Of the libraries that made it, where these are not those that the store was begun with."""

    def to_bytes(self) -> bytes:
        """The file."""
        said = self.model_dump(mode="json")
        if self.versions is None:
            del said["versions"]
        return dump_json(said)


@dataclass(frozen=True, eq=False)
class Shard:
    """The pairs of a shard as they are stored."""

    x_1: Tensor
    """float16 [n, C, h, w]."""
    cost: Tensor
    """float32 [n]."""
    x_0: Tensor | None = None
    """float16 [n, C, h, w] of inverted pairs; None where the seed gives it."""

    def to_bytes(self) -> bytes:
        """The file: the same bytes for the same pairs."""
        return save(self._tensors())

    @staticmethod
    def from_bytes(data: bytes, manifest: Manifest, count: int) -> Shard:
        """Read the file.

        Args:
            data: All of it.
            manifest: Of its store.
            count: How many pairs it should have.

        Raises:
            DamagedShard: It is no shard of this store with so many pairs.
        """
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise DamagedShard("it is no safetensors file") from error
        shape = (count, *manifest.latent_shape)
        expected = {"x_1": (torch.float16, shape), "cost": (torch.float32, (count,))}
        if manifest.kind == "inverted":
            expected["x_0"] = torch.float16, shape
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if found != expected:
            raise DamagedShard(f"it should hold {expected}, not {found}")
        return Shard(**tensors)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: Mapping[str, Tensor | None] = {"x_0": self.x_0, "x_1": self.x_1, "cost": self.cost}
        return {name: t.contiguous() for name, t in tensors.items() if t is not None}


class DamagedShard(ValueError):
    """A shard is not what its sidecar says; why, in words."""


def shard_of(x_0: Tensor, x_1: Tensor, *, keep_x_0: bool) -> Shard:
    """Round pairs to what is stored.

    Args:
        x_0: float32 [n, C, h, w] on the CPU.
        x_1: Likewise.
        keep_x_0: Store it too, because no seed gives it.
    """
    stored = x_1.half()
    start = x_0.half() if keep_x_0 else None
    return Shard(stored, _costs(start.float() if start is not None else x_0, stored), start)


def sidecar_of(
    shard: Shard, data: bytes, first: int, x_0: Tensor, versions: dict[str, str] | None = None
) -> Sidecar:
    """Vouch for a shard.

    Args:
        shard: The pairs.
        data: Its file.
        first: The index of its first pair.
        x_0: float32 [n, C, h, w] on the CPU: the noise; not used if the shard stores it.
        versions: Of the libraries that made it, if they are not the manifest's.
    """
    x_1 = shard.x_1.numpy().astype(np.float64)
    costs = shard.cost.numpy().astype(np.float64)
    return Sidecar(
        first=first,
        count=len(shard.x_1),
        size=len(data),
        sha256=sha256(data),
        x_0_sha256=hash_x_0(x_0 if shard.x_0 is None else shard.x_0.float()),
        statistics=Statistics(
            mean=float(x_1.mean()),
            std=float(x_1.std()),
            min=float(x_1.min()),
            max=float(x_1.max()),
            cost_mean=float(costs.mean()),
            cost_max=float(costs.max()),
        ),
        versions=versions,
    )


def hash_x_0(x_0: Tensor) -> str:
    """SHA-256 of noise, float32 on the CPU."""
    return sha256(x_0.contiguous().numpy().astype("<f4", copy=False).tobytes())


def write_shard(
    folder: Folder,
    number: int,
    shard: Shard,
    first: int,
    x_0: Tensor,
    versions: dict[str, str] | None = None,
) -> Sidecar:
    """Write a shard, then its sidecar, each whole or not at all.

    Args:
        folder: The store.
        number: Of the shard.
        shard: The pairs.
        first: The index of its first pair.
        x_0: As in `sidecar_of`.
        versions: As in `sidecar_of`.

    Raises:
        WorkError: The bytes did not arrive.
    """
    data = shard.to_bytes()
    sidecar = sidecar_of(shard, data, first, x_0, versions)
    folder.write(shard_name(number), data)
    folder.write(sidecar_name(number), sidecar.to_bytes())
    return sidecar


def read_sidecar(folder: Folder, manifest: Manifest, number: int) -> Sidecar | None:
    """The sidecar of a shard; None if it is not there.

    Raises:
        DamagedShard: It is no sidecar, or of another shard.
        WorkError: It is there and cannot be read.
    """
    data = folder.read(sidecar_name(number))
    if data is None:
        return None
    try:
        sidecar = Sidecar.model_validate(parse_json(data, sidecar_name(number)))
    except (ValidationError, Unreadable) as error:
        raise DamagedShard(f"{sidecar_name(number)} is no sidecar") from error
    indices = manifest.shard_range(number)
    if (sidecar.first, sidecar.count) != (indices.start, len(indices)):
        raise DamagedShard(f"{sidecar_name(number)} is of other pairs")
    return sidecar


def read_shard(folder: Folder, manifest: Manifest, number: int) -> tuple[Shard, Sidecar] | None:
    """A shard, known to be what was written; None if it, or its sidecar, is not there.

    Raises:
        DamagedShard: It is not what its sidecar says.
        WorkError: It is there and cannot be read.
    """
    sidecar = read_sidecar(folder, manifest, number)
    data = None if sidecar is None else folder.read(shard_name(number))
    if sidecar is None or data is None:
        return None
    if sha256(data) != sidecar.sha256:
        was = "its checksum differs"
        if len(data) != sidecar.size:
            was = f"it has {len(data)} bytes and should have {sidecar.size}"
        raise DamagedShard(was)
    return Shard.from_bytes(data, manifest, sidecar.count), sidecar


def _costs(x_0: Tensor, x_1: Tensor) -> Tensor:
    """float32 [n]; by numpy, whose sums do not depend on the number of threads."""
    difference: NDArray[np.float64] = x_1.numpy().astype(np.float64) - x_0.numpy()
    return torch.from_numpy(np.square(difference).reshape(len(x_0), -1).mean(1).astype(np.float32))
