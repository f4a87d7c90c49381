"""diffusers' solvers of diffusion models, held against stock pipelines that run on them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.models import SDModel, generate, generate_latents, initial_noise
from rectiflow.models.schedulers import SCHEDULERS
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model

PROMPTS = ["two red apples", "a blue dog on the green background"]
NEGATIVES = ["sad face", "car"]
KINDS: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "v-zero-snr": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    "sample-trailing": {"prediction_type": "sample", "timestep_spacing": "trailing"},
}


def stock(model: SDModel, solver: str) -> Any:
    """The model's pipeline as a user of diffusers gives it another scheduler."""
    more = {"clip_sample": False} if solver == "ddim" else {}
    kind = getattr(diffusers, SCHEDULERS[solver])
    scheduler = kind.from_config(model.pipeline.scheduler.config, **more)
    parts = {**model.pipeline.components, "scheduler": scheduler}
    pipeline = type(model.pipeline)(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("solver", "kind", "steps"),
    [
        ("dpmpp", "epsilon", 25),
        ("dpmpp", "v-zero-snr", 25),
        ("dpmpp", "sample-trailing", 3),
        ("unipc", "epsilon", 8),
        ("unipc", "v-zero-snr", 8),
        ("unipc", "sample-trailing", 1),
        ("ddim", "epsilon", 10),
        ("ddim", "v-zero-snr", 10),
        ("ddim", "sample-trailing", 4),
    ],
)
def test_the_whole_way_is_that_of_a_stock_pipeline(solver: str, kind: str, steps: int) -> None:
    model = tiny_sd_model(**KINDS[kind])
    pipeline, noise = stock(model, solver), initial_noise(model, [3, 4], 32, 48)
    arguments: dict[str, Any] = {
        "negative_prompt": NEGATIVES,
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
    }
    rows: list[int] = []
    model.network.register_forward_hook(lambda _module, _args, output: rows.append(len(output[0])))
    latents: list[Tensor] = []

    def keep(
        _pipeline: Any, step: int, timestep: int, held: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        latents.append(held["latents"])
        return held

    theirs = pipeline(
        PROMPTS,
        latents=noise,
        height=32,
        width=48,
        output_type="pt",
        callback_on_step_end=keep,
        **arguments,
    )
    taken = sum(rows)
    rows.clear()
    solution = generate_latents(model, PROMPTS, noise, solver=solver, **arguments)
    assert solution.nfe == sum(rows) == taken == 2 * 2 * steps
    assert solution.x.dtype == torch.float32
    torch.testing.assert_close(model.decode(solution.x), theirs.images, atol=1e-5, rtol=0)
    # Random decoders saturate; latents do not.
    assert (solution.x - latents[-1]).abs().max() <= 1e-5 * latents[-1].abs().max()


def test_pictures_are_those_of_a_stock_pipeline() -> None:
    """From prompts to pixels by `generate`, each picture from its own seed."""
    model = tiny_sd_model("v_prediction")
    ours = generate(model, PROMPTS, seed=[3, 4], num_inference_steps=6, guidance_scale=5.0)
    pipeline = stock(model, "dpmpp")
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=6,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="pt",
    ).images
    for picture, tensor in zip(ours, theirs, strict=True):
        pixels = torch.tensor(list(picture.tobytes())).reshape(32, 32, 3)
        off = pixels - 255 * tensor.permute(1, 2, 0)
        assert off.abs().max() <= 0.5 + 1e-2


@pytest.mark.parametrize("kind", ["epsilon", "v-zero-snr"])
def test_what_is_told_of_ddim_is_eulers_way_on_the_straight_path(kind: str) -> None:
    model = tiny_sd_model(**KINDS[kind], timestep_spacing="trailing")
    noise = initial_noise(model, [0], 32, 32)
    arguments: dict[str, Any] = {
        "num_inference_steps": 5,
        "guidance_scale": 2.0,
        "keep_trajectory": True,
    }
    seen: dict[str, list[tuple[int, float]]] = {"ddim": [], "euler": []}
    states = {}
    for solver, steps in seen.items():

        def note(step: int, t: Tensor, x: Tensor, steps: list[Any] = steps) -> None:
            steps.append((step, float(t)))

        solution = generate_latents(
            model, "cat", noise, solver=solver, callback_on_step_end=note, **arguments
        )
        assert solution.trajectory is not None
        assert torch.equal(solution.trajectory[-1], solution.x)
        states[solver] = solution.trajectory
    assert [step for step, _ in seen["ddim"]] == list(range(5))
    for (_, ours), (_, theirs) in zip(seen["euler"], seen["ddim"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    scale = states["euler"].abs().amax((1, 2, 3, 4))
    off = (states["euler"] - states["ddim"]).abs().amax((1, 2, 3, 4))
    assert (off <= 1e-4 * scale).all()


@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
@pytest.mark.parametrize("rectified", [False, True])
def test_times_rise_to_one_and_states_lie_on_the_straight_path(
    solver: str, rectified: bool
) -> None:
    model = tiny_sd_model("sample", rectified=rectified)
    times: list[float] = []
    noise = initial_noise(model, [0], 32, 32)
    solution = generate_latents(
        model,
        "cat",
        noise,
        solver=solver,
        num_inference_steps=6,
        guidance_scale=1.0,
        callback_on_step_end=lambda step, t, x: times.append(float(t)),
        keep_trajectory=True,
    )
    assert len(times) == 6 and times[-1] == 1.0
    assert all(before < after for before, after in pairwise([model.t_min - 1e-6, *times]))
    assert solution.trajectory is not None
    torch.testing.assert_close(
        solution.trajectory[0], model.initial_state(noise), atol=1e-5, rtol=0
    )
    assert solution.trajectory.shape == (7, *noise.shape)
    assert solution.nfe == 6


def test_euler_is_a_stock_pipeline_with_first_order_dpmpp() -> None:
    """Also where DDIM's steps do not end on the next timestep: 1000 is no multiple of these."""
    model = tiny_sd_model("v_prediction")
    parts = model.pipeline.components | {
        "scheduler": diffusers.DPMSolverMultistepScheduler.from_config(
            model.pipeline.scheduler.config, solver_order=1, timestep_spacing="trailing"
        )
    }
    pipeline = type(model.pipeline)(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(model, [0], 32, 32)
    for steps in (1, 3, 7):
        arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 3.0}
        theirs = pipeline("cat", latents=noise, output_type="latent", **arguments).images
        euler = generate_latents(model, "cat", noise, solver="euler", **arguments).x
        assert (theirs - euler).abs().max() <= 1e-4 * euler.abs().max()


@pytest.mark.parametrize("solver", list(SCHEDULERS))
def test_a_state_that_a_callback_returns_is_gone_on_from(solver: str) -> None:
    """A multistep solver forgets what it remembered of the state before."""
    model = tiny_sd_model("sample", timestep_spacing="trailing")
    noise = initial_noise(model, [0], 32, 32)
    other = torch.randn_like(noise)
    arguments: dict[str, Any] = {
        "num_inference_steps": 6,
        "guidance_scale": 1.0,
        "solver": solver,
        "keep_trajectory": True,
    }

    def replaced(step: int, t: Tensor, x: Tensor) -> Tensor | None:
        return other if step == 2 else None

    plain = generate_latents(model, "cat", noise, **arguments)
    changed = generate_latents(model, "cat", noise, callback_on_step_end=replaced, **arguments)
    # From there on, nothing of the first three steps is left.
    again = generate_latents(model, "cat", -noise, callback_on_step_end=replaced, **arguments)
    assert plain.trajectory is not None and changed.trajectory is not None
    assert torch.equal(changed.trajectory[:3], plain.trajectory[:3])
    assert torch.equal(changed.trajectory[3], other)
    assert not torch.equal(changed.x, plain.x)
    assert torch.equal(changed.x, again.x)


def test_dpmpp_comes_closer_to_the_flow_than_ddim() -> None:
    """What it is a teacher for: the end of the same flow, in fewer steps."""
    model = tiny_sd_model("v_prediction", timestep_spacing="trailing")
    noise = initial_noise(model, [0], 32, 32)

    def end(solver: str, steps: int) -> Tensor:
        arguments = {"num_inference_steps": steps, "guidance_scale": 1.0}
        return generate_latents(model, "cat", noise, solver=solver, **arguments).x

    exact = end("heun", 40)
    error = {solver: (end(solver, 15) - exact).square().mean() for solver in SCHEDULERS}
    assert error["dpmpp"] < 0.5 * error["ddim"]
    assert error["unipc"] < 0.5 * error["ddim"]


def test_what_cannot_be() -> None:
    model, noise = tiny_sd_model(), torch.randn(1, 4, 8, 8)
    with pytest.raises(InputError, match="leave the grid out"):
        generate_latents(model, "cat", noise, solver="dpmpp", grid="uniform")
    for steps in (0, 1001):
        with pytest.raises(InputError, match="give 1 to 1000"):
            generate_latents(model, "cat", noise, solver="dpmpp", num_inference_steps=steps)
    with pytest.raises(InputError, match="ddim does not know rectified flows such as tiny-sd"):
        generate_latents(tiny_sd_model(rectified=True), "cat", noise, solver="ddim")
    with pytest.raises(InputError, match="dpmpp is for diffusion models, and tiny is a flow"):
        generate_latents(tiny_model(), "cat", noise, solver="dpmpp")
    with pytest.raises(InputError, match="unknown solver 'magic'"):
        generate_latents(model, "cat", noise, solver="magic")
