"""Couplings are pure functions of sample numbers, and have the laws they are said to have."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rectiflow.flow.grid import uniform
from rectiflow.flow.solver import integrate
from rectiflow.models.generate import generate_latents
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.straighten import coupling, online
from tests.straighten.toy_flow import PROMPTS, WORLD, ToyFlow, TrainedWorld
from tests.tiny import tiny_model

SHAPE = (1, 1, 1)


def stored(numbers: Sequence[int]) -> SimpleNamespace:
    """Pairs of the two worlds, 1000 of them in some order: x_1 = m + s x_0."""
    indices = [7 * number % 1000 + number // 1000 * 1000 for number in numbers]
    x_0 = coupling.stored_noise(0, indices, SHAPE)
    prompts = [PROMPTS[i % 2] for i in indices]
    x_1 = torch.stack([WORLD[p].state(x, 1.0) for p, x in zip(prompts, x_0, strict=True)]).float()
    return SimpleNamespace(x_0=x_0, x_1=x_1, prompts=prompts)


PAIRS = coupling.StoredPairs(stored)


def same(a: coupling.Piece, b: coupling.Piece, rows: Sequence[int]) -> None:
    for name in ("x_0", "x_1", "t_0", "t_1", "guidance"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x[list(rows)], y, rtol=0, atol=1e-6)
    assert [a.prompts[row] for row in rows] == b.prompts


def teacher(**settings: object) -> online.Teacher:
    given = {"solver": "euler", "num_inference_steps": 8, "guidance_scales": (1.0,)} | settings
    return online.Teacher(ToyFlow(TrainedWorld()), **given)  # type: ignore[arg-type]


EDGES = torch.tensor([0.0, 0.3, 0.6, 1.0])
COUPLINGS = {
    "stored": PAIRS,
    "independent": coupling.Independent(PAIRS, seed=3),
    "annealed": coupling.Annealed(PAIRS, seed=3, samples=20),
    "online": online.OnlineTeacher(teacher(), PROMPTS, SHAPE, seed=5),
    "windows": online.Windows(teacher(), EDGES, online.NoiseAlone(PROMPTS, SHAPE, 5), seed=5),
    "noised": online.Windows(teacher(), EDGES, PAIRS, seed=5, noised=True),
}


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_sample_is_the_same_whatever_it_is_asked_for_with(name: str) -> None:
    draw = COUPLINGS[name]
    whole = draw(range(12))
    same(whole, draw(range(12)), range(12))
    same(whole, draw([7, 3]), [7, 3])
    same(whole, draw(range(1, 12, 2)), range(1, 12, 2))


def test_a_piece_is_a_straight_line() -> None:
    x_0, x_1 = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t_0, t_1 = torch.tensor([0.0, 0.2, 0.5]).double(), torch.tensor([1.0, 0.6, 0.7]).double()
    piece = coupling.Piece(x_0, x_1, ["a"] * 3, t_0, t_1)
    torch.testing.assert_close(piece.at(t_0), x_0)
    torch.testing.assert_close(piece.at(t_1), x_1)
    t = (t_0 + t_1) / 2
    torch.testing.assert_close(piece.at(t), (x_0 + x_1) / 2)
    rest = (t_1 - t).float()[:, None, None, None]
    torch.testing.assert_close(piece.at(t) + rest * piece.velocity, x_1)
    whole = coupling.Piece.whole(x_0, x_1, ["a"] * 3)
    torch.testing.assert_close(whole.velocity, x_1 - x_0)


def test_stored_pairs_are_told_their_guidance() -> None:
    piece = coupling.StoredPairs(stored, guidance=1.5)([0, 4])
    assert torch.equal(piece.x_0, coupling.stored_noise(0, [0, 28], SHAPE))
    assert piece.guidance is not None and piece.guidance.tolist() == [1.5, 1.5]
    assert PAIRS([0]).guidance is None


def test_independent_noise_knows_nothing_of_the_latents() -> None:
    piece = COUPLINGS["independent"](range(4000))
    pairs = PAIRS(range(4000))
    assert torch.equal(piece.x_1, pairs.x_1)
    x_0 = piece.x_0.flatten()
    assert abs(float(x_0.mean())) < 0.06 and float(x_0.var()) == pytest.approx(1, abs=0.08)
    assert abs(float(torch.corrcoef(torch.stack([x_0, pairs.x_0.flatten()]))[0, 1])) < 0.06
    assert len(x_0.unique()) > 3990


def test_annealing_goes_from_flow_matching_to_reflow() -> None:
    """x_0' has unit variance for every β, and correlates with x_0 as √(1 - β²)."""
    for schedule, betas in {
        "linear": (1.0, 0.5, 0.0, 0.0),
        "cosine": (1.0, 0.5, 0.0, 0.0),
        "exponential": (1.0, 0.6065, 0.3679, 0.1353),
    }.items():
        annealed = coupling.Annealed(PAIRS, 3, samples=1000, schedule=schedule)  # type: ignore[arg-type]
        found = [annealed.beta(number) for number in (0, 500, 1000, 2000)]
        assert found == pytest.approx(betas, abs=1e-4)
    late = coupling.Annealed(PAIRS, 3, samples=5)(range(10, 20))
    assert torch.equal(late.x_0, PAIRS(range(10, 20)).x_0)
    # Far into a long schedule β hardly changes: take it as 0.6 for 4000 samples.
    steady = coupling.Annealed(PAIRS, 3, samples=10**8)
    numbers = range(4 * 10**7, 4 * 10**7 + 4000)
    piece, pairs = steady(numbers), PAIRS(numbers)
    assert steady.beta(numbers[0]) == pytest.approx(0.6)
    x, y = piece.x_0.flatten(), pairs.x_0.flatten()
    assert float(x.var()) == pytest.approx(1, abs=0.1)
    assert float((x * y).mean() / y.square().mean()) == pytest.approx(0.8, abs=0.05)
    assert torch.equal(piece.x_1, pairs.x_1)


def test_online_pairs_are_those_of_a_store() -> None:
    """Sample n has noise and prompt of pair n, and what its teacher makes of them."""
    model = tiny_model()
    prompts = ["a red apple", "two cats", "a dog"]
    shape = model.latent_shape(32, 32)
    maker = online.Teacher(model, "euler", 4, (2.0,))
    piece = online.OnlineTeacher(maker, prompts, shape, seed=11)([5, 6])
    x_0 = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(11 + i)) for i in (5, 6)]
    )
    wanted = generate_latents(
        model, ["a dog", "a red apple"], x_0, num_inference_steps=4, guidance_scale=2.0
    ).x
    assert torch.equal(piece.x_0, x_0) and torch.equal(piece.x_1, wanted)
    assert piece.guidance is not None and piece.guidance.tolist() == [2.0, 2.0]


def test_every_sample_draws_its_guidance() -> None:
    model = tiny_model()
    maker = online.Teacher(model, "euler", 2, (1.0, 3.0))
    draw = online.OnlineTeacher(maker, ["a cat"], model.latent_shape(16, 16), seed=0)
    piece = draw(range(8))
    assert piece.guidance is not None and set(piece.guidance.tolist()) == {1.0, 3.0}
    for row, scale in enumerate(piece.guidance.tolist()):
        alone = generate_latents(
            model, "a cat", piece.x_0[[row]], num_inference_steps=2, guidance_scale=scale
        ).x
        torch.testing.assert_close(piece.x_1[[row]], alone, rtol=0, atol=1e-5)


def test_windows_begin_and_end_on_the_teachers_trajectory() -> None:
    maker = teacher(num_inference_steps=200, solver="heun")
    draw = online.Windows(maker, EDGES, online.NoiseAlone(PROMPTS, SHAPE, 5), seed=5)
    piece = draw(range(24))
    noise = coupling.stored_noise(5, range(24), SHAPE)
    assert set(piece.t_0.tolist()) == set(EDGES[:-1].double().tolist())
    for row, prompt in enumerate(piece.prompts):
        flow = WORLD[prompt]  # in closed form
        for x, t in ((piece.x_0, piece.t_0), (piece.x_1, piece.t_1)):
            torch.testing.assert_close(
                x[row].double(), flow.state(noise[row].double(), t[row]), rtol=1e-4, atol=1e-4
            )


def test_noised_windows_begin_between_noise_and_data() -> None:
    piece = online.Windows(teacher(num_inference_steps=30), EDGES, PAIRS, seed=5, noised=True)(
        range(9)
    )
    pairs = PAIRS(range(9))
    torch.testing.assert_close(piece.x_0, pairs.at(piece.t_0))
    model = ToyFlow(TrainedWorld())
    row = 4
    low, high = piece.t_0[row], piece.t_1[row]
    steps = round(30 * float(high - low))
    field = GuidedVelocity(model, model.encode_prompt([piece.prompts[row]]))
    end = integrate(field, piece.x_0[[row]], low + (high - low) * uniform(steps)).x
    torch.testing.assert_close(piece.x_1[[row]], end)


def test_a_piece_for_an_exact_field_begins_at_its_first_state() -> None:
    """t_min > 0: the line the student follows leads from initial_state(x_0) to x_1."""

    class Late(ToyFlow):
        t_min = 0.064

        def initial_state(self, x_0: Tensor) -> Tensor:
            return x_0 / 1.066

    pairs = PAIRS(range(5))
    piece = pairs.started_from(Late())
    torch.testing.assert_close(piece.at(piece.t_0), pairs.x_0 / 1.066)
    assert piece.t_0.tolist() == [0.064] * 5
    one_step = pairs.x_0 / 1.066 + (1 - 0.064) * piece.velocity
    torch.testing.assert_close(one_step, pairs.x_1)
    assert torch.equal(pairs.started_from(ToyFlow()).x_0, pairs.x_0)
