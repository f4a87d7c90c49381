"""A shard opened for reading: mapped where it is local, and known to be what was written."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.guarded import Unreadable, parse_json, read_tensors
from rectiflow.straighten.folder import Folder, reason, sha256
from rectiflow.straighten.manifest import Manifest, shard_name, sidecar_name
from rectiflow.straighten.shard import DamagedShard, Shard, Sidecar, read_sidecar

AGAIN = "run the same `rectiflow pairs` command again, which makes what is missing or damaged"
_HEADER = 4096
"""Bytes asked for at first; a shard's header has about 200."""
_ROWS = 64
"""Pairs whose noise is hashed at a time."""

State = tuple[int, int, int]
"""Of a local file, what changes when the file does: inode, size, time."""
Vouched = tuple[State | None, str]
"""The state and the checksum of a shard's file."""


class CorruptShard(InputError):
    """A shard that cannot be read, or is not what was written.

    Args:
        message: The whole line; one argument is all that PyTorch gives to make an error of a worker
            anew.
        number: Of the shard.
        file: Its name, or its sidecar's.
        fault: What is wrong with it: `is missing`.
    """

    def __init__(self, message: str, number: int = -1, file: str = "", fault: str = "") -> None:
        super().__init__(message)
        self.number, self.file, self.fault = number, file, fault

    @classmethod
    def of(
        cls, store: str, number: int, file: str, fault: str, remedy: str = AGAIN
    ) -> CorruptShard:
        """The error of a file of a store, with what to do about it."""
        return cls(f"{store}/{file} {fault}: {remedy}", number, file, fault)


@dataclass(frozen=True, eq=False)
class OpenShard:
    """The pairs of a shard, with what vouches for them."""

    shard: Shard
    sha256: str
    """Of its file."""
    x_0_sha256: str
    """Of the noise its pairs were made from."""
    state: State | None
    """Of its file, if that is local."""
    versions: dict[str, str] | None = None
    """Of the libraries that made it, where the store was begun with others."""

    @property
    def vouched(self) -> Vouched:
        """What to give to `open_shard` the next time."""
        return self.state, self.sha256

    @cached_property
    def nbytes(self) -> int:
        """In memory, or mapped into it."""
        tensors = (self.shard.x_1, self.shard.cost, self.shard.x_0)
        return sum(t.nbytes for t in tensors if t is not None)


def open_shard(
    folder: Folder, manifest: Manifest, number: int, known: Vouched | None = None
) -> OpenShard:
    """Read a shard and compare its checksum with its sidecar's.

    Args:
        folder: The store.
        manifest: Of the store.
        number: Of the shard.
        known: What vouched for it when it was last opened; an unchanged local file is not compared
            again.

    Raises:
        CorruptShard: It is missing, damaged, or not the shard of this store; the file is named.
    """
    name = shard_name(number)
    file = sidecar_name(number)  # until the sidecar is known to be whole
    try:
        sidecar = read_sidecar(folder, manifest, number)
        if sidecar is None:
            raise CorruptShard.of(folder.uri, number, file, "is missing")
        file = name
        if not folder.local:
            data = folder.read(name)
            if data is None:
                raise CorruptShard.of(folder.uri, number, name, "is missing")
            _compare(sha256(data), len(data), sidecar)
            shard, state = Shard.from_bytes(data, manifest, sidecar.count), None
        else:
            path = folder.path(name)
            state = _state(path)
            if known != (state, sidecar.sha256):
                with open(path, "rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
                _compare(digest, state[1], sidecar)
            shard = _mapped(path, manifest, sidecar.count)
    except DamagedShard as error:
        raise CorruptShard.of(folder.uri, number, file, f"is damaged ({error})") from error
    except FileNotFoundError as error:
        raise CorruptShard.of(folder.uri, number, name, "is missing") from error
    except (OSError, WorkError) as error:
        fault = f"cannot be read ({reason(error)})"
        raise CorruptShard.of(folder.uri, number, file, fault) from error
    return OpenShard(shard, sidecar.sha256, sidecar.x_0_sha256, state, sidecar.versions)


def check_noise(folder: Folder, manifest: Manifest, number: int, opened: OpenShard) -> None:
    """See that the noise read or drawn here is that which the pairs were made from.

    Raises:
        CorruptShard: It is not: PyTorch draws other numbers than it did, or the sidecar is damaged.
    """
    digest = hashlib.sha256()
    x_0 = opened.shard.x_0
    indices = manifest.shard_range(number)
    for start in range(0, len(indices), _ROWS):
        seeds = [manifest.seed(i) for i in indices[start : start + _ROWS]]
        rows = noise(seeds, manifest.latent_shape) if x_0 is None else x_0[start : start + _ROWS]
        digest.update(rows.float().numpy().astype("<f4", copy=False).data)
    if digest.hexdigest() == opened.x_0_sha256:
        return
    sidecar = sidecar_name(number)
    fault, remedy = "has a checksum of x_0 that is not the shard's", f"remove it, and {AGAIN}"
    if x_0 is None:
        fault = (
            f"belongs to other noise than torch {torch.__version__} draws from its seeds; it was "
            f"made with torch {(opened.versions or manifest.versions)['torch']}"
        )
        remedy = f"install that version, or, if this shard alone is concerned, {remedy}"
    raise CorruptShard.of(folder.uri, number, sidecar, fault, remedy)


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise of each seed, drawn on the CPU: float32 [B, *shape].

    Bit for bit what `models.generate.initial_noise` draws.

    Example:
        >>> one = torch.randn(3, generator=torch.Generator().manual_seed(7))
        >>> bool((noise([5, 7], [3])[1] == one).all())
        True
    """
    x_0 = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(x_0, seeds, strict=True):
        torch.randn(tuple(shape), generator=generator.manual_seed(seed), out=row)
    return x_0


def read_costs(folder: Folder, manifest: Manifest, number: int) -> Tensor:
    """The costs of a shard's pairs, float32 [n], without reading its latents or its checksum.

    Raises:
        CorruptShard: There are none to be read.
    """
    path, name = folder.path(shard_name(number)), shard_name(number)
    count = len(manifest.shard_range(number))
    try:
        beginning: bytes = folder.fs.cat_file(path, start=0, end=_HEADER)
        (length,) = struct.unpack("<Q", beginning[:8])
        place = parse_json(beginning[8 : 8 + length], name)["cost"]
        first, last = (8 + length + offset for offset in place["data_offsets"])
        data: bytes = folder.fs.cat_file(path, start=first, end=last)
        if place["dtype"] != "F32" or len(data) != 4 * count:
            raise ValueError(f"{len(data)} bytes of costs for {count} pairs")
        return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
    except FileNotFoundError as error:
        raise CorruptShard.of(folder.uri, number, name, "is missing") from error
    except OSError as error:
        fault = f"cannot be read ({reason(error)})"
        raise CorruptShard.of(folder.uri, number, name, fault) from error
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CorruptShard.of(folder.uri, number, name, f"is damaged ({error})") from error


def _compare(digest: str, size: int, sidecar: Sidecar) -> None:
    if size != sidecar.size:
        raise DamagedShard(f"it has {size} bytes and should have {sidecar.size}")
    if digest != sidecar.sha256:
        raise DamagedShard("it has another checksum than its sidecar says")


def _mapped(path: str, manifest: Manifest, count: int) -> Shard:
    """A local shard whose pages are read when they are needed."""
    try:
        tensors, _ = read_tensors(Path(path))
    except Unreadable as error:
        raise DamagedShard("it is no safetensors file") from error
    shape = (count, *manifest.latent_shape)
    expected = {"x_1": (torch.float16, shape), "cost": (torch.float32, (count,))}
    if manifest.kind == "inverted":
        expected["x_0"] = torch.float16, shape
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        raise DamagedShard(f"it should hold {expected}, not {found}")
    return Shard(**tensors)


def _state(path: str) -> State:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns
