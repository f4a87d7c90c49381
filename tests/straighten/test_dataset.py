from __future__ import annotations

import pickle
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from rectiflow.errors import InputError
from rectiflow.straighten.curation import Curated
from rectiflow.straighten.dataset import PairDataset
from rectiflow.straighten.order import PairOrder
from rectiflow.straighten.pair_batch import PairBatch
from rectiflow.straighten.reading import PairStore
from tests.straighten.stores import make_store


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Curated:
    folder = tmp_path_factory.mktemp("pairs")
    make_store(folder, num=60, shard_size=7)
    store = PairStore.open(folder)
    return Curated(store, PairOrder(store, seed=4, buffer_shards=2), flip=0.5, seed=4)


def numbers(batches: Iterable[PairBatch]) -> list[list[int]]:
    return [batch.numbers.tolist() for batch in batches if batch.numbers is not None]


def flat(batches: Iterable[PairBatch]) -> list[int]:
    return [number for batch in numbers(batches) for number in batch]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_every_sample_once(source: Curated, ranks: int) -> None:
    datasets = [PairDataset(source, 12, rank=r, ranks=ranks, samples=120) for r in range(ranks)]
    dealt = [numbers(dataset) for dataset in datasets]
    assert {len(batches) for batches in dealt} == {10}
    # The same samples make a step, however many processes share it.
    for step in range(10):
        together = sorted(number for batches in dealt for number in batches[step])
        assert together == list(range(12 * step, 12 * step + 12))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_split_a_rank_without_overlap(
    source: Curated, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each of the workers makes, by the dataset's own rule; real processes follow below."""
    from types import SimpleNamespace

    import rectiflow.straighten.dataset as module

    seen: list[int] = []
    for rank in range(ranks):
        monkeypatch.setattr(module, "get_worker_info", lambda: None)
        alone = numbers(PairDataset(source, 8, rank=rank, ranks=ranks, samples=60))
        parts = []
        for worker in range(max(1, workers)):
            info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
            monkeypatch.setattr(module, "get_worker_info", lambda info=info: info)
            parts.append(numbers(PairDataset(source, 8, rank=rank, ranks=ranks, samples=60)))
        # Taken in turn, as a DataLoader does, they are the batches that one process makes.
        in_turn = [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
        assert in_turn == alone
        seen += [number for batch in in_turn for number in batch]
    assert sorted(seen) == list(range(60))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_real_worker_processes(source: Curated, workers: int) -> None:
    alone = list(PairDataset(source, 8, rank=1, ranks=2, samples=52))
    dataset = PairDataset(source, 8, rank=1, ranks=2, samples=52)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    made = list(loader)
    assert numbers(made) == numbers(alone) and len(made) == 7
    for one, other in zip(made, alone, strict=True):
        assert torch.equal(one.x_0, other.x_0) and torch.equal(one.x_1, other.x_1)
        assert one.prompts == other.prompts and torch.equal(one.cost, other.cost)


def test_a_copy_in_another_process_is_the_same(source: Curated) -> None:
    dataset = PairDataset(source, 16, samples=32)
    dataset.load_state_dict({"next_sample": 5})
    (one, *_), (other, *_) = dataset, pickle.loads(pickle.dumps(dataset))
    assert one.numbers.tolist() == other.numbers.tolist() == list(range(5, 21))
    assert torch.equal(one.x_0, other.x_0) and torch.equal(one.x_1, other.x_1)


@pytest.mark.slow  # a spawned process imports PyTorch again
def test_spawned_workers_need_nothing_of_ours(source: Curated) -> None:
    """Where processes cannot be forked the store has to be opened anew in each."""
    dataset = PairDataset(source, 16, samples=32)
    made = list(dataset.loader(num_workers=1, multiprocessing_context="spawn"))
    assert flat(made) == list(range(32))
    assert torch.equal(made[1].x_1, source.samples(range(16, 32)).x_1)


def test_an_epoch_is_every_pair_once(source: Curated) -> None:
    batches = list(PairDataset(source, 8, samples=120))
    indices = torch.cat([batch.index for batch in batches]).tolist()
    assert sorted(indices[:60]) == sorted(indices[60:]) == list(range(60))
    assert indices[:60] != indices[60:]


@pytest.mark.parametrize("stop", [1, 7, 40, 59])
def test_resuming_at_any_sample_is_the_unbroken_stream(source: Curated, stop: int) -> None:
    whole = source.samples(range(stop, stop + 24))
    dataset = PairDataset(source, 8)
    dataset.load_state_dict({"next_sample": stop})
    made = list(islice(dataset, 3))
    assert flat(made) == list(range(stop, stop + 24))
    assert torch.equal(torch.cat([batch.x_0 for batch in made]), whole.x_0)
    assert torch.equal(torch.cat([batch.x_1 for batch in made]), whole.x_1)
    assert dataset.state_dict() == {"next_sample": stop + 24}


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_counts_what_was_handed_out(source: Curated, workers: int) -> None:
    """Not what workers have made ahead; and with other ranks and batches than before."""
    dataset = PairDataset(source, 8, rank=1, ranks=2)
    states = []
    for batch in dataset.loader(num_workers=workers):
        assert batch.numbers is not None
        states.append((batch.numbers.tolist(), dataset.state_dict()["next_sample"]))
        if len(states) == 3:
            break
    assert [after for _, after in states] == [8, 16, 24]
    assert [ns[-1] for ns, _ in states] == [7, 15, 23]
    ranks = [PairDataset(source, 6, rank=r, ranks=3, samples=60) for r in range(3)]
    for resumed in ranks:
        resumed.load_state_dict(dataset.state_dict())
    found = sorted(number for resumed in ranks for number in flat(resumed))
    assert found == list(range(24, 60))


def test_iterating_again_goes_on(source: Curated) -> None:
    dataset = PairDataset(source, 8, samples=30)
    assert flat(islice(dataset, 2)) == list(range(16))
    assert flat(dataset) == list(range(16, 30))
    assert flat(dataset) == [] and dataset.state_dict() == {"next_sample": 30}


def test_an_error_in_a_worker_still_names_the_file(tmp_path: Path) -> None:
    make_store(tmp_path)
    store = PairStore.open(tmp_path)
    (tmp_path / "shard-000001.safetensors").write_bytes(b"nothing")
    dataset = PairDataset(Curated(store, PairOrder(store, 0)), 23, samples=23)
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"shard-000001.safetensors is damaged") as raised:
            list(dataset.loader(num_workers=workers))
        assert "\n" not in str(raised.value)


def test_impossible_splits(source: Curated) -> None:
    with pytest.raises(InputError, match="rank 2 of 2"):
        PairDataset(source, 8, rank=2, ranks=2)
    with pytest.raises(InputError, match="batch_size 3 gives some of 4 ranks nothing"):
        PairDataset(source, 3, rank=0, ranks=4)
    with pytest.raises(InputError, match="samples is -1"):
        PairDataset(source, 3, samples=-1)
