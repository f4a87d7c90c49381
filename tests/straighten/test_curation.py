from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.straighten.curation import BLOCK, Curated, Mixed, keep_pairs
from rectiflow.straighten.order import PairOrder
from rectiflow.straighten.reading import PairStore
from tests.straighten.stores import inverted_noise, latents, make_store, noise


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    folder = tmp_path_factory.mktemp("pairs")
    make_store(folder, num=50, shard_size=8, prompts=("an apple", "the cat on the Left", "a car"))
    return PairStore.open(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    folder = tmp_path_factory.mktemp("real")
    make_store(folder, num=12, shard_size=5, kind="inverted", prompts=("a photo",))
    return PairStore.open(folder)


def lengths(indices: range) -> list[float]:
    return [float((latents(i) - noise(100 + i)).double().square().mean()) for i in indices]


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (0.1, 5), (0.3, 15), (0.019, 0)])
def test_exactly_the_longest_are_dropped(store: PairStore, share: float, dropped: int) -> None:
    keep = keep_pairs(store, drop_longest=share)
    longest = sorted(range(50), key=lengths(range(50)).__getitem__)[50 - dropped :]
    assert np.flatnonzero(~keep).tolist() == sorted(longest)
    order = PairOrder(store, seed=0, keep=keep)
    assert order.kept == 50 - dropped
    assert not set(order.indices(range(order.kept)).tolist()) & set(longest)


def test_held_out_pairs_are_the_last_and_do_not_count(store: PairStore) -> None:
    keep = keep_pairs(store, drop_longest=0.5, held_out=10)
    longest = sorted(range(40), key=lengths(range(40)).__getitem__)[20:]
    assert np.flatnonzero(~keep).tolist() == sorted([*longest, *range(40, 50)])


def test_ties_are_decided_by_index(tmp_path: Path) -> None:
    """Pairs of one length, by being the same pair turned about: the first are kept."""
    same = {i: noise(100 + i) * 0 + 3 for i in range(6)}
    make_store(tmp_path, num=6, kind="inverted", x_1=same, latent_shape=(1, 1, 1))
    opened = PairStore.open(tmp_path)
    costs = opened.costs()
    # Of inverted pairs x_0 is stored: make all costs equal by writing x_1 = x_0 + 1 where exact.
    exact = {i: inverted_noise(i, (1, 1, 1)) for i in range(6)}
    make_store(tmp_path, num=6, kind="inverted", x_1=exact, latent_shape=(1, 1, 1))
    opened = PairStore.open(tmp_path)
    assert opened.costs().tolist() == [0.0] * 6 and costs.unique().numel() == 6
    assert np.flatnonzero(keep_pairs(opened, 0.5)).tolist() == [0, 1, 2]


def test_a_pair_without_a_length_is_the_longest(tmp_path: Path) -> None:
    broken = latents(3).clone()
    broken[0, 0, 0] = torch.nan
    make_store(tmp_path, num=10, x_1={3: broken})
    opened = PairStore.open(tmp_path)
    assert np.flatnonzero(~keep_pairs(opened, 0.1)).tolist() == [3]


def test_impossible_shares(store: PairStore) -> None:
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="drop_longest is"):
            keep_pairs(store, share)
    with pytest.raises(InputError, match="50 pairs cannot be held out of 50"):
        keep_pairs(store, held_out=50)
    with pytest.raises(InputError, match=r"flip is 1\.5"):
        Curated(store, PairOrder(store, 0), flip=1.5)
    source = Curated(store, PairOrder(store, 0))
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match="share of what is mixed in"):
            Mixed(source, source, share)


# Mirror images.


def test_flips_mirror_noise_and_latents_together(store: PairStore) -> None:
    order = PairOrder(store, seed=2)
    plain = Curated(store, order).samples(range(200))
    flipped = Curated(store, order, flip=0.5, seed=2).samples(range(200))
    assert plain.prompts == flipped.prompts and torch.equal(plain.index, flipped.index)
    mirrored = 0
    for row in range(200):
        as_it_was = torch.equal(flipped.x_0[row], plain.x_0[row])
        which = slice(None) if as_it_was else slice(None, None)
        expected_0, expected_1 = plain.x_0[row], plain.x_1[row]
        if not as_it_was:
            expected_0, expected_1 = (
                torch.from_numpy(np.ascontiguousarray(x.numpy()[..., ::-1]))
                for x in (expected_0, expected_1)
            )
            assert "Left" not in plain.prompts[row]
            mirrored += 1
        assert torch.equal(flipped.x_0[row, which], expected_0)
        assert torch.equal(flipped.x_1[row], expected_1)
    # A third of the prompts has sides; binomial, n about 133: five standard deviations are 29.
    free = sum("Left" not in prompt for prompt in plain.prompts)
    assert abs(mirrored - free / 2) < 29
    assert torch.equal(plain.cost, flipped.cost)


def test_flips_follow_the_number_and_not_the_batch(store: PairStore) -> None:
    source = Curated(store, PairOrder(store, seed=2), flip=0.5, seed=7)
    whole = source.samples(range(40, 140))
    for start in (40, 93):
        part = source.samples(range(start, start + 7))
        assert torch.equal(part.x_0, whole.x_0[start - 40 : start - 33])
        assert torch.equal(part.x_1, whole.x_1[start - 40 : start - 33])
    other = Curated(store, PairOrder(store, seed=2), flip=0.5, seed=8).samples(range(40, 140))
    assert not torch.equal(other.x_0, whole.x_0) and torch.equal(other.index, whole.index)
    # The same pair is mirrored in one epoch and not in another.
    longer = source.samples(range(400))
    of_one = [longer.x_0[row] for row in range(400) if longer.index[row] == longer.index[0]]
    assert len({x.numpy().tobytes() for x in of_one}) == 2


def test_always_and_never(store: PairStore) -> None:
    order = PairOrder(store, seed=2)
    plain = Curated(store, order).samples(range(50))
    always = Curated(store, order, flip=1.0).samples(range(50))
    for row in range(50):
        dims = () if "Left" in plain.prompts[row] else (-1,)
        assert torch.equal(always.x_1[row], plain.x_1[row].flip(dims))


# Mixtures.


@pytest.mark.parametrize("share", [0.25, 0.1, 1 / 3, 0.001])
def test_mixtures_have_their_share_and_leave_nothing_out(
    store: PairStore, real: PairStore, share: float
) -> None:
    sources = Curated(store, PairOrder(store, 0)), Curated(real, PairOrder(real, 0))
    mixed = Mixed(*sources, share, seed=5)
    places = [mixed.place(number) for number in range(3 * BLOCK)]
    for blocks in (1, 2, 3):
        mine = [place for other, place in places[: blocks * BLOCK] if not other]
        others = [place for other, place in places[: blocks * BLOCK] if other]
        assert abs(len(others) - share * blocks * BLOCK) <= 1
        assert sorted(mine) == list(range(len(mine)))
        assert sorted(others) == list(range(len(others)))
    if share == 0.25:
        # Spread and not in a pattern: runs of main samples between two others are of many lengths.
        found = np.flatnonzero([other for other, _ in places])
        assert len(set(np.diff(found).tolist())) > 8
        assert np.diff(found).max() < 60


def test_mixed_samples_are_those_of_their_stores(store: PairStore, real: PairStore) -> None:
    mixed = Mixed(Curated(store, PairOrder(store, 0)), Curated(real, PairOrder(real, 0)), 0.4, 1)
    batch = mixed.samples(range(30, 90))
    assert batch.numbers is not None and batch.numbers.tolist() == list(range(30, 90))
    kinds = set()
    for row in range(60):
        other, place = mixed.place(30 + row)
        opened = real if other else store
        index = PairOrder(opened, 0).index(place)
        kinds.add(other)
        assert batch.index[row] == index
        expected = inverted_noise(index) if other else noise(100 + index)
        assert torch.equal(batch.x_0[row], expected)
        assert torch.equal(batch.x_1[row], latents(index))
        assert batch.prompts[row] == opened.prompts[index % len(opened.prompts)]
    assert kinds == {True, False}
    again = mixed.samples([77, 31])
    assert torch.equal(again.x_1, batch.x_1[[47, 1]])


def test_each_store_keeps_its_own_epochs(store: PairStore, real: PairStore) -> None:
    mixed = Mixed(Curated(store, PairOrder(store, 0)), Curated(real, PairOrder(real, 0)), 0.2, 3)
    where = {mixed.place(number): number for number in range(BLOCK)}
    indices = mixed.samples([where[True, place] for place in range(24)]).index.tolist()
    assert sorted(indices[:12]) == sorted(indices[12:]) == list(range(12))


def test_mixtures_nest_and_refuse_other_shapes(
    store: PairStore, real: PairStore, tmp_path: Path
) -> None:
    one, two = (Curated(s, PairOrder(s, 0)) for s in (store, real))
    nested = Mixed(Mixed(one, two, 0.5, 1), two, 0.5, 2)
    assert len(nested.samples(range(64))) == 64
    make_store(tmp_path, latent_shape=(4, 6, 6))
    other = PairStore.open(tmp_path)
    with pytest.raises(InputError, match=r"\[4, 6, 8\] and \[4, 6, 6\] cannot be mixed"):
        Mixed(one, Curated(other, PairOrder(other, 0)), 0.5)
