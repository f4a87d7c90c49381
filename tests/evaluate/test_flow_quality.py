from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.evaluate.flow_quality import described, flow_samples
from rectiflow.models.generate import generate_latents, initial_noise
from rectiflow.models.prompts import Conditioning
from rectiflow.models.sd import SDModel
from rectiflow.straighten.coupling import Piece
from rectiflow.straighten.monitor import Probe, measure
from tests.tiny_sd import tiny_sd, tiny_sd_model

PROMPTS, SEEDS = ["a cat", "a dog", "a cat"], [5, 6, 7]


class LinearModel(SDModel):
    """`v(x, t | c) = a x` with `a` known by the prompt: 1 for any, ¼ for the empty one."""

    def encode_prompt(self, prompts: str | list[str]) -> Conditioning:
        texts = [prompts] if isinstance(prompts, str) else prompts
        return Conditioning(torch.tensor([1.0 if text else 0.25 for text in texts])[:, None, None])

    def differentiable_velocity(
        self, x: torch.Tensor, t: torch.Tensor | float, cond: Conditioning
    ) -> torch.Tensor:
        return cond.embeds[..., None] * x


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_linear_guided_field_has_closed_forms(guidance_scale: float) -> None:
    # x_t = exp(at) x_0 with a = α + (1 - α) / 4, so S = ‖x_0‖²/d ∫ (e^a - 1 - a e^{at})² dt.
    model = LinearModel(tiny_sd(rectified=True))
    found = flow_samples(
        model, PROMPTS, SEEDS, num_inference_steps=200, guidance_scale=guidance_scale
    )
    x_0 = initial_noise(model, SEEDS, model.default_size, model.default_size).double().flatten(1)
    square = x_0.square().mean(1).numpy()
    a = guidance_scale + (1 - guidance_scale) / 4
    grown = math.expm1(a)
    s = a * math.expm1(2 * a) / 2 - grown**2
    np.testing.assert_allclose(found["straightness"], s * square, rtol=2e-3)
    np.testing.assert_allclose(found["l2_squared"], grown**2 * square, rtol=1e-3)
    np.testing.assert_allclose(found["l2"], grown * np.sqrt(square), rtol=1e-3)
    cosh = np.log(np.cosh(grown * x_0.numpy())).mean(1)
    np.testing.assert_allclose(found["log_cosh"], cosh, rtol=1e-3)
    np.testing.assert_allclose(found["curvature"], a**3 * math.expm1(2 * a) / 2 * square, rtol=2e-2)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_diffusion_models_trajectory_is_the_one_that_generates(guidance_scale: float) -> None:
    model = tiny_sd_model()
    settings = {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    found = flow_samples(model, PROMPTS, SEEDS, **settings)
    x_0 = initial_noise(model, SEEDS, model.default_size, model.default_size)
    times: list[float] = [model.t_min]
    one_by_one = [
        flow_samples(model, [prompt], [seed], batch_size=1, **settings)
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    for name, column in found.items():
        alone = np.concatenate([part[name] for part in one_by_one])
        np.testing.assert_allclose(alone, column, rtol=1e-3)
    points = torch.linspace(model.t_min, 1, 5, dtype=torch.float64)
    times = sorted({*points.tolist(), model.t_max})
    solved = generate_latents(
        model, PROMPTS, x_0, guidance_scale=guidance_scale, grid=times, solver="midpoint"
    )
    cost = (solved.x - x_0).double().flatten(1).square().mean(1)
    np.testing.assert_allclose(found["l2_squared"], cost, rtol=1e-3)


def test_straightness_is_what_training_watches() -> None:
    model = tiny_sd_model()
    found = flow_samples(model, PROMPTS, SEEDS, batch_size=2)
    noise = initial_noise(model, SEEDS, model.default_size, model.default_size)
    piece = Piece(noise, noise, PROMPTS, torch.zeros(3), torch.ones(3))
    expected = measure(model, Probe(piece, model.encode_prompt(PROMPTS), paired=False))
    assert found["straightness"].mean() == pytest.approx(expected["straightness"], rel=1e-5)


def test_bad_input_is_refused() -> None:
    model = tiny_sd_model(rectified=True)
    with pytest.raises(InputError, match="2 seeds for 3 prompts"):
        flow_samples(model, PROMPTS, SEEDS[:2])
    with pytest.raises(InputError, match="two steps"):
        flow_samples(model, PROMPTS, SEEDS, num_inference_steps=1)
    assert described([2.0]) == {"mean": 2.0, "standard_error": 0.0, "interval": [2.0, 2.0]}
