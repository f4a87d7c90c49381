"""Making pairs: nothing is lost, whoever is killed and however many there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.models.base import FlowModel
from rectiflow.straighten.folder import TEMPORARY
from rectiflow.straighten.manifest import COMPLETE, MANIFEST, PROMPTS
from rectiflow.straighten.store_writer import PairProgress
from tests.straighten.pair_making import (
    BATCHES,
    NUM,
    Calls,
    contents,
    make,
    stop_after,
)


@pytest.mark.parametrize(
    ("workers", "scheme"), [(2, "local"), (3, "local"), (7, "local"), (1, "memory"), (3, "memory")]
)
def test_any_number_of_workers_make_the_same_store(
    model: FlowModel, whole: Path, tmp_path: Path, workers: int, scheme: str
) -> None:
    uri = str(tmp_path / "store") if scheme == "local" else f"memory://{tmp_path.name}/{workers}"
    order = list(range(workers))[::-1]
    done = [make(model, uri, worker=worker, num_workers=workers) for worker in order]
    assert [one.complete for one in done[-4:]].count(True) >= 1
    assert sum(one.made for one in done) == sum(one.total for one in done) == NUM
    assert contents(uri) == contents(whole)


@pytest.mark.parametrize("calls", [0, 1, 4, 12])
def test_an_interruption_costs_one_batch(
    model: FlowModel, whole: Path, tmp_path: Path, calls: int
) -> None:
    store = tmp_path / "store"
    with stop_after(model, calls), pytest.raises(KeyboardInterrupt):
        make(model, store, keep_seconds=0)
    before = contents(store)
    with Calls(network=model.network) as second:
        done = make(model, store, keep_seconds=0)
    if calls == 0:  # in the trial: nothing has been written
        assert not before
    else:
        finished = (calls - 1) // 2
        assert second.count["network"] == 2 * (BATCHES - finished)
        assert done.total == NUM and done.complete
    assert contents(store) == contents(whole)


def test_without_keeping_an_interruption_costs_the_shard(
    model: FlowModel, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with stop_after(model, 1 + 2 * 5), pytest.raises(KeyboardInterrupt):
        make(model, store)
    assert not [name for name in contents(store) if name.startswith(TEMPORARY)]
    with Calls(network=model.network) as second:
        make(model, store)
    assert second.count["network"] == 2 * (BATCHES - 3)
    assert contents(store) == contents(whole)


def test_damaged_parts_are_not_used(model: FlowModel, whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with stop_after(model, 1 + 2 * 2), pytest.raises(KeyboardInterrupt):
        make(model, store, keep_seconds=0)
    parts = sorted(store.glob(f"{TEMPORARY}part-*"))
    assert len(parts) == 2
    # The last byte is of a latent: the file is sound, and says something else.
    data = parts[0].read_bytes()
    parts[0].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    make(model, store, keep_seconds=0)
    assert contents(store) == contents(whole)


def test_another_number_of_workers_goes_on(model: FlowModel, whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with stop_after(model, 12), pytest.raises(KeyboardInterrupt):
        make(model, store, worker=1, num_workers=2, keep_seconds=0)
        make(model, store, worker=0, num_workers=2, keep_seconds=0)
    for worker in (2, 0, 1):
        done = make(model, store, worker=worker, num_workers=3)
    assert done.complete and contents(store) == contents(whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-000001.safetensors", lambda data: data[:-5]),
        ("shard-000003.safetensors", lambda data: data[:200] + b"\x13\x37" + data[202:]),
        ("shard-000000.safetensors", lambda data: b""),
        ("shard-000002.json", lambda data: data[:20]),
        ("shard-000002.json", lambda data: data.replace(b'"first": 14', b'"first": 7')),
    ],
)
def test_damaged_shards_are_named_and_made_again(
    model: FlowModel, whole: Path, begun: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    (begun / name).write_bytes(damage((begun / name).read_bytes()))
    shard = name.partition(".")[0] + ".safetensors"
    said: list[str] = []
    done = make(model, begun, on_event=said.append)
    assert done.remade == (shard,) and done.complete
    assert done.made == (2 if "3" in shard else 7)
    assert len(said) == 1 and said[0].startswith(f"{shard} is damaged (")
    assert contents(begun) == contents(whole)


@pytest.mark.parametrize(
    "missing",
    [
        ["shard-000001.safetensors"],
        ["shard-000001.json"],
        ["shard-000000.safetensors", "shard-000003.json", COMPLETE],
        [COMPLETE],
        [PROMPTS],
    ],
)
def test_missing_files_are_made_again(
    model: FlowModel, whole: Path, begun: Path, missing: list[str]
) -> None:
    for name in missing:
        (begun / name).unlink()
    done = make(model, begun)
    assert done.complete and not done.remade
    assert contents(begun) == contents(whole)


def test_leftovers_are_cleaned_and_damaged_prompts_written_again(
    model: FlowModel, whole: Path, begun: Path
) -> None:
    for name in (f"{TEMPORARY}shard-000001.json-9-ab", f"{TEMPORARY}manifest.json-9-ab"):
        (begun / name).write_bytes(b"half")
    (begun / PROMPTS).write_bytes(b"half")
    said: list[str] = []
    make(model, begun, on_event=said.append)
    assert said == ["prompts.jsonl.gz is damaged: writing it again"]
    assert contents(begun) == contents(whole)


def test_a_kill_before_the_manifest_leaves_a_free_folder(
    model: FlowModel, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / f"{TEMPORARY}manifest.json-9-ab").write_bytes(b'{"fo')
    make(model, store)
    assert contents(store) == contents(whole)


def test_progress(model: FlowModel, begun: Path) -> None:
    (begun / "shard-000001.json").unlink()
    seen: list[PairProgress] = []
    done = make(model, begun, progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1] == PairProgress(done=NUM, total=NUM, made=7, bytes=done.bytes)
    assert sum(len(d) for n, d in contents(begun).items() if n.startswith("shard")) == done.bytes


def test_threads_are_those_of_the_store(model: FlowModel, tmp_path: Path) -> None:
    store = tmp_path / "store"
    seen: set[int] = set()
    handle = model.network.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        make(model, store, threads=2, worker=0, num_workers=2, num=4, shard_size=2)
        assert json.loads((store / MANIFEST).read_text())["threads"] == 2
        seen.clear()
        make(model, store, worker=1, num_workers=2, num=4, shard_size=2)
    finally:
        handle.remove()
    assert seen == {2} and torch.get_num_threads() == 1
    with pytest.raises(InputError, match="with threads 2, and 1 is asked for"):
        make(model, store, threads=1, num=4, shard_size=2)
