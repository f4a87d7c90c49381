from __future__ import annotations

import pickle
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import chisquare

from rectiflow.errors import InputError
from rectiflow.straighten.order import PairOrder, shuffled


def sharded(*sizes: int) -> SimpleNamespace:
    ends = np.cumsum([0, *sizes])
    return SimpleNamespace(ranges=[range(int(a), int(b)) for a, b in pairwise(ends)])


EVEN = sharded(*[10] * 12)
RAGGED = sharded(7, 1, 30, 4, 4, 19, 2)


@pytest.mark.parametrize("store", [EVEN, RAGGED, sharded(1), sharded(5)])
@pytest.mark.parametrize("buffer_shards", [1, 3, 100])
def test_every_pair_comes_once_an_epoch(store: SimpleNamespace, buffer_shards: int) -> None:
    order = PairOrder(store, seed=3, buffer_shards=buffer_shards)
    total = store.ranges[-1].stop
    assert order.kept == total
    for epoch in (0, 1, 7):
        numbers = range(epoch * total, (epoch + 1) * total)
        assert sorted(order.indices(numbers)) == list(range(total))


def test_epochs_and_seeds_differ_and_are_shuffled() -> None:
    orders = [PairOrder(EVEN, seed, 4) for seed in (0, 1)]
    found = [o.indices(range(start, start + 120)).tolist() for o in orders for start in (0, 120)]
    found.append(list(range(120)))
    for i, one in enumerate(found):
        for other in found[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 15  # about 1 of 120
    # The shards' order differs as well, not only the order within groups.
    assert orders[0].shards_of(0) != orders[0].shards_of(1)


def test_a_number_alone_decides() -> None:
    """Neither the order of the questions nor what was remembered changes an answer."""
    order = PairOrder(RAGGED, seed=5, buffer_shards=2)
    numbers = np.random.default_rng(0).permutation(10 * order.kept)
    asked = {int(n): order.index(int(n)) for n in numbers}
    fresh = PairOrder(RAGGED, seed=5, buffer_shards=2)
    assert [asked[n] for n in range(10 * order.kept)] == [
        fresh.index(n) for n in range(10 * order.kept)
    ]
    k = 4 * order.kept + 13
    resumed = PairOrder(RAGGED, seed=5, buffer_shards=2)
    assert resumed.indices(range(k, k + 100)).tolist() == [asked[n] for n in range(k, k + 100)]


@pytest.mark.parametrize("buffer_shards", [1, 2, 5])
def test_few_shards_are_open_at_a_time(buffer_shards: int) -> None:
    order = PairOrder(EVEN, seed=0, buffer_shards=buffer_shards)
    for epoch in range(3):
        numbers = range(120 * epoch, 120 * (epoch + 1))
        shards = order.indices(numbers) // 10
        size = 10 * buffer_shards
        groups = [set(shards[i : i + size].tolist()) for i in range(0, 120, size)]
        assert all(len(group) <= buffer_shards for group in groups)
        # No shard is returned to once its group is over: each is read once an epoch.
        assert sum(map(len, groups)) == 12
        # What is remembered of any window of one group's length is two groups at most.
        for i in range(120 - size):
            assert len(set(shards[i : i + size].tolist())) <= 2 * buffer_shards


def test_pairs_of_a_group_are_mixed() -> None:
    """A shard's pairs are spread over its group's whole length, all places alike."""
    order = PairOrder(sharded(*[100] * 4), seed=0, buffer_shards=4)
    places = []
    for epoch in range(40):
        shards = order.indices(range(400 * epoch, 400 * (epoch + 1))) // 100
        places += np.flatnonzero(shards == 2).tolist()
    counts = np.histogram(places, bins=20, range=(0, 400))[0]
    assert chisquare(counts).pvalue > 1e-4
    assert counts.sum() == 4000


def test_permutations_are_uniform() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(1200):
        counts[np.arange(6), shuffled(6, 1, 2, epoch)] += 1
    assert all(chisquare(row).pvalue > 1e-5 for row in counts)


def test_the_order_is_what_it_was() -> None:
    """These figures are in no checkpoint, but a run resumed with a new release depends on them."""
    order = PairOrder(sharded(3, 3, 3), seed=11, buffer_shards=2)
    assert order.indices(range(18)).tolist() == FROZEN


FROZEN = [0, 5, 3, 4, 1, 2, 6, 7, 8, 4, 5, 3, 1, 2, 0, 7, 8, 6]


def test_only_kept_pairs() -> None:
    keep = np.random.default_rng(1).random(67) < 0.4
    keep[7:8] = False  # a whole shard
    order = PairOrder(RAGGED, seed=0, buffer_shards=3, keep=keep)
    assert order.kept == keep.sum()
    for epoch in range(3):
        numbers = range(epoch * order.kept, (epoch + 1) * order.kept)
        assert sorted(order.indices(numbers)) == np.flatnonzero(keep).tolist()


def test_it_travels_to_workers() -> None:
    order = PairOrder(RAGGED, seed=0, buffer_shards=3)
    order.index(0)
    other = pickle.loads(pickle.dumps(order))
    assert other.indices(range(200)).tolist() == order.indices(range(200)).tolist()


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(InputError, match="buffer_shards is 0"):
        PairOrder(EVEN, 0, 0)
    with pytest.raises(InputError, match="no pair is left"):
        PairOrder(EVEN, 0, 2, keep=np.zeros(120, bool))
    with pytest.raises(InputError, match="keep speaks of 119 pairs"):
        PairOrder(EVEN, 0, 2, keep=np.ones(119, bool))
    with pytest.raises(InputError, match="no sample -1"):
        PairOrder(EVEN, 0, 2).index(-1)
