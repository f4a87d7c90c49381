"""The files of a store: manifest, prompts, shards, and the folder that keeps them whole."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import random
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors import safe_open

from rectiflow.errors import InputError, WorkError
from rectiflow.straighten.folder import TEMPORARY, Folder, sha256
from rectiflow.straighten.manifest import (
    MANIFEST,
    PROMPTS,
    Manifest,
    hash_prompts,
    pack_prompts,
    read_manifest,
    read_prompts,
    shard_name,
    sidecar_name,
    unpack_prompts,
)
from rectiflow.straighten.shard import (
    DamagedShard,
    Shard,
    read_shard,
    read_sidecar,
    shard_of,
    write_shard,
)
from tests.straighten.stores import manifest_of

AWKWARD = ["a red cat", "", 'say "no"', "zwei\nZeilen", "ein\u2028Bär über\u0085Bäumen", "🍎" * 40]


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "local":
        (tmp_path / "store").mkdir()
        yield Folder(tmp_path / "store")
    else:
        yield Folder(f"memory://{tmp_path.name}/store")
        fsspec.filesystem("memory").store.clear()


def test_the_manifest_comes_back(folder: Folder) -> None:
    manifest = manifest_of(negative_prompt="ein Bär", guidance_scale=1.5)
    folder.write(MANIFEST, manifest.to_bytes())
    assert read_manifest(folder) == manifest
    assert Manifest.from_bytes(manifest.to_bytes(), "here").to_bytes() == manifest.to_bytes()


def test_where_pairs_are() -> None:
    manifest = manifest_of(num=23, shard_size=5, base_seed=100)
    ranges = [manifest.shard_range(shard) for shard in range(manifest.num_shards)]
    assert [i for indices in ranges for i in indices] == list(range(23))
    assert [len(indices) for indices in ranges] == [5, 5, 5, 5, 3]
    assert manifest_of(num=20, shard_size=5).num_shards == 4
    assert [manifest.prompt_index(i) for i in (0, 3, 4, 22)] == [0, 3, 0, 2]
    assert manifest.seed(22) == 122


def test_manifests_that_cannot_be_used(folder: Folder) -> None:
    with pytest.raises(InputError, match=r"no store of pairs at .*store: it has no manifest.json"):
        read_manifest(folder)
    good = json.loads(manifest_of().to_bytes())
    for bad in (b"", b"{}", b"[1]", b"\xff\x00", json.dumps(good | {"extra": 1}).encode()):
        folder.write(MANIFEST, bad)
        with pytest.raises(InputError, match=r"manifest.json is not the manifest of a store"):
            read_manifest(folder)
    folder.write(MANIFEST, json.dumps(good | {"format": 3, "new": 1}).encode())
    with pytest.raises(InputError, match="is of format 3, and this version reads up to 2: update"):
        read_manifest(folder)
    with pytest.raises(ValueError, match="num"):
        manifest_of(num=0)


def test_prompts_come_back_and_their_file_is_always_the_same(folder: Folder) -> None:
    data = pack_prompts(AWKWARD)
    assert unpack_prompts(data, "here") == AWKWARD
    # As anyone would read it: a JSON string on each line.
    lines = gzip.decompress(data).decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == AWKWARD and lines[-1] == ""
    assert hash_prompts(AWKWARD) == hashlib.sha256(gzip.decompress(data)).hexdigest()
    flags, mtime = struct.unpack("<BI", data[3:8])
    assert flags == 0 and mtime == 0  # neither a file name nor a time
    manifest = manifest_of(prompts=AWKWARD)
    folder.write(PROMPTS, data)
    assert read_prompts(folder, manifest) == AWKWARD


def test_prompts_that_are_not_those_of_the_manifest(folder: Folder) -> None:
    manifest = manifest_of(prompts=AWKWARD)
    with pytest.raises(InputError, match=r"prompts.jsonl.gz is missing: make the pairs again"):
        read_prompts(folder, manifest)
    folder.write(PROMPTS, pack_prompts(AWKWARD[::-1]))
    with pytest.raises(InputError, match="is not the prompt list of the manifest"):
        read_prompts(folder, manifest)
    whole = pack_prompts(AWKWARD)
    for damaged in (whole[:-9], b"", whole[:20] + b"\x00\x00" + whole[22:], gzip.compress(b"[]\n")):
        folder.write(PROMPTS, damaged)
        with pytest.raises(InputError):
            read_prompts(folder, manifest)


@pytest.mark.parametrize("kind", ["generated", "inverted"])
def test_a_shard_comes_back(folder: Folder, kind: str) -> None:
    manifest = manifest_of(kind=kind, num=8, shard_size=5)
    inverted = kind == "inverted"
    x_0, x_1 = torch.randn(3, 4, 6, 8), 3 * torch.randn(3, 4, 6, 8)
    shard = shard_of(x_0, x_1, keep_x_0=inverted)
    sidecar = write_shard(folder, 1, shard, 5, x_0)
    found = read_shard(folder, manifest, 1)
    assert found is not None and found[1] == sidecar == read_sidecar(folder, manifest, 1)
    assert torch.equal(found[0].x_1, x_1.half()) and torch.equal(found[0].cost, shard.cost)
    # All of it again, by numpy and the standard library.
    data = folder.read(shard_name(1))
    assert data is not None and sidecar.sha256 == hashlib.sha256(data).hexdigest()
    assert (sidecar.first, sidecar.count, sidecar.size) == (5, 3, len(data))
    start = x_0.numpy().astype(np.float16).astype(np.float32) if inverted else x_0.numpy()
    assert sidecar.x_0_sha256 == hashlib.sha256(start.tobytes()).hexdigest()
    end = x_1.numpy().astype(np.float16).astype(np.float32)
    cost = ((end - start) ** 2).mean((1, 2, 3))
    assert shard.cost.numpy() == pytest.approx(cost, rel=1e-6)
    statistics = sidecar.statistics
    assert statistics.cost_mean == pytest.approx(cost.mean(), rel=1e-6)
    assert statistics.cost_max == pytest.approx(cost.max(), rel=1e-6)
    assert (statistics.min, statistics.max) == (end.min(), end.max())
    assert statistics.mean == pytest.approx(end.astype(np.float64).mean(), abs=1e-9)
    assert statistics.std == pytest.approx(end.astype(np.float64).std(), rel=1e-9)


def test_a_shard_is_always_the_same_and_has_no_metadata(tmp_path: Path) -> None:
    x_0, x_1 = torch.randn(4, 4, 6, 8), torch.randn(4, 4, 6, 8)
    shard = shard_of(x_0, x_1, keep_x_0=True)
    data = shard.to_bytes()
    again = Shard(x_1=shard.x_1.clone(), cost=shard.cost.clone(), x_0=shard.x_0)
    assert all(again.to_bytes() == data for _ in range(20))
    (tmp_path / "a.safetensors").write_bytes(data)
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert set(file.keys()) == {"x_0", "x_1", "cost"} and not file.metadata()


def test_a_row_costs_the_same_in_any_company() -> None:
    x_0, x_1 = torch.randn(7, 4, 6, 8), torch.randn(7, 4, 6, 8)
    whole = shard_of(x_0, x_1, keep_x_0=False).cost
    rows = [shard_of(x_0[[i]], x_1[[i]], keep_x_0=False).cost for i in range(7)]
    assert torch.equal(whole, torch.cat(rows))


def test_damage_is_seen(folder: Folder) -> None:
    manifest = manifest_of(num=8, shard_size=5)
    x_0, x_1 = torch.randn(5, 4, 6, 8), torch.randn(5, 4, 6, 8)
    assert read_shard(folder, manifest, 0) is None
    write_shard(folder, 0, shard_of(x_0, x_1, keep_x_0=False), 0, x_0)
    data = folder.read(shard_name(0))
    assert data is not None
    rng = random.Random(0)
    for _ in range(20):
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        folder.write(shard_name(0), flipped)
        with pytest.raises(DamagedShard, match="its checksum differs"):
            read_shard(folder, manifest, 0)
    folder.write(shard_name(0), data[:-1])
    size = len(data)
    with pytest.raises(DamagedShard, match=f"it has {size - 1} bytes and should have {size}"):
        read_shard(folder, manifest, 0)
    folder.remove([shard_name(0)])
    assert read_shard(folder, manifest, 0) is None
    folder.write(shard_name(0), data)
    assert read_shard(folder, manifest, 0) is not None
    for bad in (b"", b"{}", b'{"first": 0}'):
        folder.write(sidecar_name(0), bad)
        with pytest.raises(DamagedShard, match=r"shard-000000.json is no sidecar"):
            read_shard(folder, manifest, 0)


def test_a_sound_shard_of_other_pairs_is_damage_too(folder: Folder) -> None:
    manifest = manifest_of(num=8, shard_size=5)
    x = torch.randn(5, 4, 6, 8)
    write_shard(folder, 0, shard_of(x, x, keep_x_0=False), 5, x)
    with pytest.raises(DamagedShard, match="of other pairs"):
        read_shard(folder, manifest, 0)
    narrow = torch.randn(5, 4, 6, 4)
    write_shard(folder, 0, shard_of(narrow, narrow, keep_x_0=False), 0, narrow)
    with pytest.raises(DamagedShard, match="it should hold"):
        read_shard(folder, manifest, 0)
    write_shard(folder, 0, shard_of(x, x, keep_x_0=True), 0, x)
    with pytest.raises(DamagedShard, match="it should hold"):
        read_shard(folder, manifest, 0)


def test_files_are_replaced_whole_and_nothing_is_left_over(folder: Folder) -> None:
    assert folder.names() == set() and folder.read("a") is None
    folder.write("a", b"one")
    folder.write("a", b"two" * 1000)
    assert folder.read("a") == b"two" * 1000 and folder.names() == {"a"}
    folder.write("a", b"three", new=True)
    assert folder.read("a") == b"two" * 1000
    folder.write("b", b"", new=True)
    assert folder.read("b") == b"" and folder.names() == {"a", "b"}
    folder.check_writable()
    assert folder.names() == {"a", "b"}
    folder.remove(["a", "never there"])
    assert folder.names() == {"b"}


def test_unfinished_files_are_told_apart(folder: Folder) -> None:
    names = {f"{TEMPORARY}{shard_name(1)}-7-ab", f"{TEMPORARY}{shard_name(11)}-7-ab", shard_name(1)}
    assert folder.temporaries(names, [shard_name(1)]) == [f"{TEMPORARY}{shard_name(1)}-7-ab"]


def test_addresses_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"nowhere://a: Protocol not known: nowhere: give a folder"
    ):
        Folder("nowhere://a")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match=r"file is a file: give a folder"):
        Folder(file).names()
    with pytest.raises(InputError, match=r"cannot write to .*file/store \(.+\): choose another"):
        Folder(file / "store").check_writable()
    with pytest.raises(InputError, match=r"cannot write to /proc/store \(.+\): choose another"):
        Folder("/proc/store").check_writable()
    assert file.read_text() == "mine"


def test_a_package_that_is_missing_is_named() -> None:
    known = fsspec.available_protocols()
    if "s3" not in known or _importable("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(InputError, match=r"s3://a/b: .*s3fs"):
        Folder("s3://a/b")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """In a process of its own that may write no file of more than 10 kB, as a full disk would."""
    folder = Folder(tmp_path)
    folder.write("a", b"before")
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            folder.write("b", b"x" * 9_999)
            folder.write("a", b"x" * 20_000)
        except WorkError as error:
            said = str(error)
            os._exit(0 if "/a (File too large): make room, and the same" in said else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert folder.read("a") == b"before" and folder.names() == {"a", "b"}


class Lossy(MemoryFileSystem):
    """A file system that loses the last byte of large files, or has no room for them."""

    protocol = ("lossy",)
    store: ClassVar[dict[str, Any]] = {}
    full = False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if len(value) > 100 and self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().pipe_file(path, value[:-1] if len(value) > 100 else value, mode, **kwargs)


def test_what_is_written_is_read_back_before_it_counts() -> None:
    fsspec.register_implementation("lossy", Lossy, clobber=True)
    folder = Folder("lossy://a/b")
    folder.write("small", b"x" * 100)
    with pytest.raises(WorkError, match=r"b/large reads back differently from what was written"):
        folder.write("large", b"x" * 101)
    folder.fs.full = True
    with pytest.raises(WorkError, match=r"b/large \(No space left on device\): make room"):
        folder.write("large", b"x" * 101)
    assert folder.names() == {"small"}


def test_checksums() -> None:
    assert sha256(b"abc").startswith("ba7816bf")


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True
