from __future__ import annotations

import json
import os
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.straighten.reading import CorruptShard, PairStore
from tests.straighten.stores import PROMPT_LIST, SHAPE, inverted_noise, latents, make_store, noise

SCATTERED = [22, 0, 7, 7, 4, 5, 13, 1]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "pairs")
    return tmp_path / "pairs"


def check_rows(opened: PairStore, indices: list[int]) -> None:
    batch = opened.pairs(indices)
    assert len(batch) == len(indices)
    assert batch.index.tolist() == indices
    assert batch.seed.tolist() == [100 + i for i in indices]
    assert batch.prompts == [PROMPT_LIST[i % 4] for i in indices]
    assert batch.x_0.dtype == batch.x_1.dtype == batch.cost.dtype == torch.float32
    assert torch.equal(batch.x_0, torch.stack([noise(100 + i) for i in indices]))
    assert torch.equal(batch.x_1, torch.stack([latents(i) for i in indices]))
    squares = (batch.x_1 - batch.x_0).double().square().mean((1, 2, 3))
    torch.testing.assert_close(batch.cost.double(), squares, rtol=1e-6, atol=0)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_any_rows_in_any_order(where: str, tmp_path: Path) -> None:
    uri = f"memory://reading/{tmp_path.name}" if where == "memory" else str(tmp_path / "pairs")
    make_store(uri)
    opened = PairStore.open(uri)
    assert len(opened) == 23
    assert opened.ranges == [range(0, 5), range(5, 10), range(10, 15), range(15, 20), range(20, 23)]
    assert opened.manifest.model == "tiny"
    check_rows(opened, SCATTERED)
    check_rows(opened, list(range(23)))
    expected = opened.pairs(list(range(23))).cost
    assert torch.equal(opened.costs(), expected)
    assert len(opened.pairs([])) == 0


def test_a_pair_by_its_place_as_in_a_list(store: Path) -> None:
    opened = PairStore.open(store)
    for place in (0, 7, 22, -1, -23):
        pair, index = opened[place], range(23)[place]
        assert (pair.index, pair.seed) == (index, 100 + index)
        assert pair.prompt == PROMPT_LIST[index % 4]
        assert torch.equal(pair.x_0, noise(100 + index))
        assert torch.equal(pair.x_1, latents(index))
    assert [pair.index for pair in opened[3:21:4]] == [3, 7, 11, 15, 19] and opened[5:5] == []
    for place in (23, -24):
        with pytest.raises(IndexError):
            opened[place]
    # So the loop of Python's protocol ends, and a stock DataLoader has its data set.
    assert [pair.index for pair in opened] == list(range(23))
    loader = torch.utils.data.DataLoader(opened, batch_size=5)
    batch = next(iter(loader))
    assert torch.equal(batch.x_1, torch.stack([latents(i) for i in range(5)]))
    assert list(batch.prompt) == [PROMPT_LIST[i % 4] for i in range(5)]


def test_the_recipe_of_the_docs(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs as it stands, and goes on where it was stopped."""
    docs = Path(__file__).parents[2] / "docs" / "straighten.md"
    code = docs.read_text().partition("<!-- tested: loader -->\n```python\n")[2].partition("```")[0]
    monkeypatch.chdir(store.parent)
    (store.parent / "pairs-1").symlink_to(store)
    seen: list[int] = []
    exec(code, {"train_step": lambda batch: seen.extend(batch.index.tolist())})
    assert len(seen) == 40
    first = seen.copy()
    exec(code, {"train_step": lambda batch: seen.extend(batch.index.tolist())})
    assert len(seen) == 80 and seen[40:] != first
    assert sorted(seen[:23]) == list(range(23))  # an epoch has every pair once


def test_noise_is_that_of_generate(tmp_path: Path) -> None:
    """Bit for bit what the teacher started from, as `generate` draws it."""
    from rectiflow.models.generate import initial_noise
    from tests.tiny import tiny_model

    model = tiny_model()
    shape = model.latent_shape(32, 24)
    make_store(tmp_path, latent_shape=shape, height=32, width=24, base_seed=2**32 - 3)
    batch = PairStore.open(tmp_path).pairs(SCATTERED)
    assert torch.equal(batch.x_0, initial_noise(model, batch.seed.tolist(), 32, 24))


def test_inverted_pairs_have_their_own_noise(tmp_path: Path) -> None:
    make_store(tmp_path, kind="inverted")
    batch = PairStore.open(tmp_path).pairs(SCATTERED)
    assert torch.equal(batch.x_0, torch.stack([inverted_noise(i) for i in SCATTERED]))
    assert torch.equal(batch.x_1, torch.stack([latents(i) for i in SCATTERED]))


def test_a_pair_that_is_not_there(store: Path) -> None:
    opened = PairStore.open(store)
    for index in (-1, 23):
        with pytest.raises(InputError, match=f"no pair {index}: it has 23"):
            opened.pairs([0, index])


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no store of pairs at"):
        PairStore.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="on_corrupt 'ignore': use raise or skip"):
        PairStore.open(tmp_path, on_corrupt="ignore")  # type: ignore[arg-type]


def test_a_changed_prompt_list(store: Path) -> None:
    from rectiflow.straighten.manifest import pack_prompts

    (store / "prompts.jsonl.gz").write_bytes(pack_prompts([*PROMPT_LIST[:3], "a cat"]))
    with pytest.raises(InputError, match="is not the prompt list of the manifest"):
        PairStore.open(store)


# Damage.


def flip_bit(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def bits(file: Path) -> list[int]:
    """In the header's length, the header, the first and the last tensor's bytes."""
    size = 8 * file.stat().st_size
    return [2, 8 * 60 + 1, size // 2 + 3, size - 1]


@pytest.mark.parametrize("place", range(4))
def test_one_flipped_bit_is_found_and_named(store: Path, place: int) -> None:
    file = store / "shard-000002.safetensors"
    flip_bit(file, bits(file)[place])
    opened = PairStore.open(store)
    check_rows(opened, [0, 9, 22])  # other shards are as good as before
    with pytest.raises(CorruptShard, match=r"shard-000002.safetensors is damaged") as raised:
        opened.pairs([0, 12])
    assert "run the same `rectiflow pairs` command again" in str(raised.value)
    assert isinstance(raised.value, InputError) and "\n" not in str(raised.value)
    assert raised.value.number == 2


def test_one_flipped_bit_in_memory_storage() -> None:
    uri = "memory://reading/flipped"
    make_store(uri)
    files = fsspec.filesystem("memory")
    path = "/reading/flipped/shard-000001.safetensors"
    data = bytearray(files.cat_file(path))
    data[-20] ^= 4
    files.pipe_file(path, bytes(data))
    with pytest.raises(CorruptShard, match=r"shard-000001.safetensors is damaged"):
        PairStore.open(uri).pairs([7])


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_shard(store: Path, left: int) -> None:
    file = store / "shard-000001.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    opened = PairStore.open(store)
    with pytest.raises(CorruptShard, match=r"shard-000001.safetensors is damaged.*bytes"):
        opened.pairs([5])
    with pytest.raises(CorruptShard, match=r"shard-000001.safetensors"):
        opened.pairs([5])  # not forgotten
    check_rows(opened, [4, 10])


@pytest.mark.parametrize("file", ["shard-000003.safetensors", "shard-000003.json"])
def test_a_missing_file_is_named_at_once(store: Path, file: str) -> None:
    (store / file).unlink()
    with pytest.raises(CorruptShard, match=f"{file} is missing: run the same"):
        PairStore.open(store)


def test_a_file_that_goes_missing_later(store: Path) -> None:
    opened = PairStore.open(store)
    (store / "shard-000003.safetensors").unlink()
    check_rows(opened, [0])
    with pytest.raises(CorruptShard, match=r"shard-000003.safetensors is missing"):
        opened.pairs([15])
    with pytest.raises(CorruptShard, match=r"shard-000003.safetensors is missing"):
        opened.costs()


def test_a_damaged_sidecar(store: Path) -> None:
    file = store / "shard-000000.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(CorruptShard, match=r"shard-000000.json is damaged"):
        PairStore.open(store).pairs([0])


def test_shards_in_each_others_place(store: Path) -> None:
    """Whole files, right checksums, wrong pairs."""
    for suffix in ("safetensors", "json"):
        one, other = (store / f"shard-00000{i}.{suffix}" for i in (1, 2))
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
    with pytest.raises(CorruptShard, match=r"shard-000001.json is damaged .*other pairs"):
        PairStore.open(store).pairs([5])


def test_a_shard_changed_after_it_was_read(store: Path) -> None:
    """A local file is compared again when it has changed, even if it was good before."""
    opened = PairStore.open(store, cache_bytes=0)
    check_rows(opened, [0, 5, 10])
    file = store / "shard-000000.safetensors"
    flip_bit(file, 8 * file.stat().st_size - 30)
    with pytest.raises(CorruptShard, match=r"shard-000000.safetensors is damaged"):
        opened.pairs([0])


def test_another_stream_of_random_numbers(store: Path) -> None:
    """Made where PyTorch drew other numbers: its x_1 belong to other noise than we would draw."""
    file = store / "shard-000001.json"
    sidecar = json.loads(file.read_text())
    sidecar["x_0_sha256"] = "ab" * 32
    file.write_text(json.dumps(sidecar))
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"torch": "1.2.3"}))
    opened = PairStore.open(store)
    check_rows(opened, [0])
    with pytest.raises(CorruptShard, match=r"made with torch 1\.2\.3: install that version"):
        opened.pairs([6])


def test_the_noise_is_really_compared(store: Path) -> None:
    """A store whose seeds are not those of its sidecars."""
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"base_seed": 101}))
    with pytest.raises(CorruptShard, match="other noise"):
        PairStore.open(store).pairs([6])


# Leaving out.


def damage(store: Path) -> None:
    (store / "shard-000000.safetensors").unlink()
    file = store / "shard-000002.safetensors"
    flip_bit(file, 8 * file.stat().st_size - 30)
    file = store / "shard-000003.json"
    file.write_text(file.read_text().replace('"x_0_sha256": "', '"x_0_sha256": "0'))


def test_skipping_warns_once_a_shard_and_leaves_its_pairs_out(store: Path) -> None:
    damage(store)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opened = PairStore.open(store, on_corrupt="skip")
        check_rows(opened, [5, 22, 9])
        opened.costs()
    texts = [str(one.message) for one in said]
    assert len(texts) == 3
    for number, text in zip((0, 2, 3), texts, strict=True):
        assert f"shard-00000{number}" in text and "left out" in text
    assert opened.ranges == [range(5, 10), range(20, 23)]
    assert len(opened) == 8 and sorted(opened.skipped) == [0, 2, 3]
    costs = opened.costs()
    assert costs.isnan().nonzero().flatten().tolist() == [*range(5), *range(10, 20)]
    with pytest.raises(CorruptShard, match=r"shard-000002"):
        opened.pairs([11])


def test_the_order_without_them_is_the_same_each_time(store: Path) -> None:
    from rectiflow.straighten.order import PairOrder

    damage(store)
    found = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out"):
            opened = PairStore.open(store, on_corrupt="skip")
        order = PairOrder(opened, seed=1, buffer_shards=2)
        assert order.kept == 8
        found.append(order.indices(range(24)).tolist())
    assert found[0] == found[1]
    assert sorted(found[0][:8]) == [5, 6, 7, 8, 9, 20, 21, 22]


def test_nothing_left(tmp_path: Path) -> None:
    make_store(tmp_path, num=4, shard_size=4)
    (tmp_path / "shard-000000.json").write_text("{}")
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no shard that can be read"):
        PairStore.open(tmp_path, on_corrupt="skip")


def test_a_store_that_is_still_being_made(tmp_path: Path) -> None:
    make_store(tmp_path, shards=[1, 3])
    (tmp_path / "shard-000004.safetensors").write_bytes(b"its sidecar is not there yet")
    with pytest.raises(InputError, match="not complete, with 2 of 5 shards: run the same"):
        PairStore.open(tmp_path)
    opened = PairStore.open(tmp_path, allow_incomplete=True)
    assert opened.ranges == [range(5, 10), range(15, 20)] and len(opened) == 10
    assert opened.checksums is None
    check_rows(opened, [19, 5, 6])
    with pytest.raises(CorruptShard, match=r"shard-000000.json is missing"):
        opened.pairs([0])


def test_a_store_without_a_shard(tmp_path: Path) -> None:
    make_store(tmp_path, shards=[])
    with pytest.raises(InputError, match="no shard that can be read"):
        PairStore.open(tmp_path, allow_incomplete=True)


# Memory, threads, processes.


def test_what_is_kept_open_is_bounded(store: Path) -> None:
    one = 5 * (2 * 4 * 6 * 8 + 4)
    opened = PairStore.open(store, cache_bytes=2 * one)
    check_rows(opened, [0, 5])
    assert list(opened._open) == [0, 1]
    check_rows(opened, [4])  # used again: the other is the oldest
    check_rows(opened, [10])
    assert list(opened._open) == [0, 2]
    nothing = PairStore.open(store, cache_bytes=0)
    check_rows(nothing, list(range(23)))
    assert list(nothing._open) == [4]


def test_local_shards_are_mapped_and_not_read_into_memory(store: Path) -> None:
    opened = PairStore.open(store)
    opened.pairs([0])
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the kernel does not say what is mapped")
    assert "shard-000000.safetensors" in maps.read_text()


def test_threads_share_a_store(store: Path) -> None:
    opened = PairStore.open(store, cache_bytes=3000)

    def read(start: int) -> None:
        for step in range(20):
            check_rows(opened, [(start + 5 * step + i) % 23 for i in range(3)])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))


def test_a_store_travels_and_stays_checked(store: Path) -> None:
    opened = PairStore.open(store)
    assert opened.check() == {}
    other = pickle.loads(pickle.dumps(opened))
    check_rows(other, SCATTERED)
    assert other._vouched == opened._vouched and len(other._vouched) == 5
    error = CorruptShard.of("here", 3, "file", "is missing")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.number, again.file) == (str(error), 3, "file")


def test_a_fork_while_the_lock_is_held(store: Path) -> None:
    """A worker forked while another thread reads a shard must not wait for that thread for ever."""
    opened = PairStore.open(store)
    with opened._lock:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                check_rows(opened, SCATTERED)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0


def test_check_names_all_that_is_wrong(store: Path) -> None:
    opened = PairStore.open(store)
    damage(store)
    seen: list[int] = []
    faults = opened.check(seen.append)
    assert sorted(faults) == [0, 2, 3] and seen == [0, 1, 2, 3, 4]
    assert [faults[i].file for i in (0, 2, 3)] == [
        "shard-000000.safetensors",
        "shard-000002.safetensors",
        "shard-000003.json",
    ]


def test_a_shard_that_the_finished_store_does_not_list(store: Path, tmp_path: Path) -> None:
    """A whole shard with its sidecar, but of other latents: made again under other conditions."""
    make_store(tmp_path / "other", x_1={6: latents(6) / 2})
    for name in ("shard-000001.safetensors", "shard-000001.json"):
        (store / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(CorruptShard, match=r"another file than complete.json lists"):
        PairStore.open(store).pairs([6])
    (store / "complete.json").write_text("[]")
    with pytest.raises(InputError, match=r"complete.json is damaged: remove it, and run"):
        PairStore.open(store)


def test_shape_is_that_of_the_manifest(tmp_path: Path) -> None:
    """Shards of another store with sidecars of their own, whole but of another shape."""
    make_store(tmp_path / "one", latent_shape=(3, *SHAPE[1:]), shard_size=23)
    make_store(tmp_path / "two", shard_size=23)
    for name in ("shard-000000.safetensors", "shard-000000.json"):
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    (tmp_path / "two" / "complete.json").write_bytes(
        (tmp_path / "one" / "complete.json").read_bytes()
    )
    with pytest.raises(CorruptShard, match=r"shard-000000.safetensors is damaged"):
        PairStore.open(tmp_path / "two").pairs([0])
