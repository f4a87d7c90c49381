"""Stable Diffusion as a velocity field, held against diffusers' own schedulers and pipeline."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow import integrate
from rectiflow.models import (
    Conditioning,
    GuidedVelocity,
    Metadata,
    SDModel,
    generate,
    generate_latents,
    initial_noise,
    load,
    write_metadata,
)
from rectiflow.models.schedulers import rectified_scheduler
from tests.tiny import CLIP_LENGTH
from tests.tiny_sd import asked, tiny_scheduler, tiny_sd, tiny_sd_model

PROMPTS = ["two red apples", "a blue dog on the green background"]
SCHEDULES: dict[str, dict[str, Any]] = {
    "sd": {},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero-snr": {"zero_terminal_snr": True},
}


def exact_model(prediction_type: str, schedule: str = "sd") -> SDModel:
    """In float64, up to the table of ᾱ, which diffusers keeps in float32."""
    return tiny_sd_model(prediction_type, dtype=torch.float64, **SCHEDULES[schedule])


def ddim_of(model: SDModel, steps: int, **changes: Any) -> DDIMScheduler:
    """diffusers' DDIM on exactly the model's table."""
    scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config, **changes)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if scheduler.config.rescale_betas_zero_snr:
        scheduler.alphas_cumprod[-1] = 2.0**-24
    scheduler.set_timesteps(steps)
    return scheduler


def by_ddim(model: SDModel, scheduler: DDIMScheduler, x_t: Tensor, cond: Conditioning) -> Tensor:
    for timestep in scheduler.timesteps:
        x_t = scheduler.step(asked(model, x_t, timestep, cond), timestep, x_t).prev_sample
    return x_t


def assert_same(ours: Tensor, theirs: Tensor, relative: float) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


CASES = [(kind, "sd", 5) for kind in ("epsilon", "v_prediction", "sample")]
CASES += [("epsilon", "sd", steps) for steps in (1, 2, 25)]
CASES += [(kind, name, 5) for name in ("linear", "cosine") for kind in ("epsilon", "v_prediction")]
CASES += [("v_prediction", "zero-snr", 25), ("sample", "zero-snr", 5), ("epsilon", "zero-snr", 2)]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("kind", "schedule", "steps"), CASES)
def test_euler_on_the_exact_field_is_ddim(
    kind: str, schedule: str, steps: int, spacing: str
) -> None:
    model = exact_model(kind, schedule)
    path, cond = model.diffusion_path, model.encode_prompt(PROMPTS)
    assert path is not None
    scheduler = ddim_of(model, steps, timestep_spacing=spacing)
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    grid = path.grid(scheduler.timesteps)
    start = noise * torch.hypot(grid[0], 1 - grid[0])
    ours = integrate(GuidedVelocity(model, cond), start, grid).x
    assert_same(ours, by_ddim(model, scheduler, noise, cond), 1e-10)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_each_step_of_ddim_is_one_of_euler(kind: str, spacing: str) -> None:
    """Where diffusers' steps do not end on the next timestep (linspace), each by itself does."""
    model = exact_model(kind)
    path, cond = model.diffusion_path, model.encode_prompt("cat")
    assert path is not None
    steps, scheduler = 7, ddim_of(model, 7, timestep_spacing=spacing)
    for timestep in scheduler.timesteps:
        x_t = torch.randn(1, 4, 8, 8, dtype=torch.float64)
        theirs = scheduler.step(asked(model, x_t, timestep, cond), timestep, x_t).prev_sample
        after = int(timestep) - 1000 // steps
        ends = [path.straight_time(int(timestep)), path.straight_time(after)]
        s = torch.stack(ends) if after >= 0 else torch.stack([ends[0], torch.tensor(1.0).double()])
        scale = torch.hypot(s, 1 - s)
        ours = integrate(GuidedVelocity(model, cond), x_t * scale[0], s).x / scale[1]
        assert_same(ours, theirs, 1e-10)


def test_the_student_grid_of_a_diffusion_model_is_ddims_with_trailing_timesteps() -> None:
    model = tiny_sd_model("v_prediction")
    path = model.diffusion_path
    assert path is not None
    for steps in (1, 2, 4, 8, 25, 50, 999, 1000):
        scheduler = ddim_of(model, steps, timestep_spacing="trailing")
        grid = model.student_grid(steps)
        assert grid.dtype == torch.float32
        torch.testing.assert_close(grid, path.grid(scheduler.timesteps).float(), atol=0, rtol=0)
    assert model.student_grid(1).tolist() == pytest.approx([model.t_min, 1.0])
    for steps in (0, 1001):
        with pytest.raises(InputError, match="give 1 to 1000"):
            model.student_grid(steps)


def test_stable_diffusions_field_lives_where_the_conventions_say() -> None:
    model = tiny_sd_model()
    assert model.t_min == pytest.approx(0.0640, abs=5e-5)
    assert model.t_max == pytest.approx(0.9717, abs=5e-5)
    x, cond = torch.randn(2, 4, 8, 8), model.encode_prompt(PROMPTS)
    alpha = model.pipeline.scheduler.alphas_cumprod[-1]
    length = alpha.sqrt() + (1 - alpha).sqrt()
    assert float(length) == pytest.approx(1.066, abs=5e-4)
    torch.testing.assert_close(model.initial_state(x), x / length, atol=1e-6, rtol=0)
    for outside, inside in ((0.0, model.t_min), (1.0, model.t_max)):
        assert torch.equal(model.velocity(x, outside, cond), model.velocity(x, inside, cond))
    rectified = tiny_sd_model(rectified=True)
    assert (rectified.t_min, rectified.t_max) == (0.0, 1.0)
    assert rectified.initial_state(x) is x
    assert rectified.diffusion_path is None
    assert rectified.prediction_type == "velocity"
    assert model.prediction_type == "epsilon"


def test_the_exact_field_is_the_difference_of_what_the_network_expects() -> None:
    """`E[x_1] - E[x_0]` written out, at a timestep of the table."""
    model = tiny_sd_model("v_prediction", dtype=torch.float64)
    alpha = model.pipeline.scheduler.alphas_cumprod[600].double()
    a, b = alpha.sqrt(), (1 - alpha).sqrt()
    x_t, cond = torch.randn(2, 4, 8, 8, dtype=torch.float64), model.encode_prompt(PROMPTS)
    v = asked(model, x_t, torch.tensor(600), cond)
    expected = (a * x_t - b * v) - (b * x_t + a * v)
    ours = model.velocity(x_t / (a + b), a / (a + b), cond)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


def test_gradients_are_those_of_the_field() -> None:
    for rectified in (False, True):
        model = tiny_sd_model("v_prediction", rectified=rectified, dtype=torch.float64)
        cond, t = model.encode_prompt(PROMPTS), torch.tensor([0.3, 0.7])
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        weight = model.network.conv_out.weight.requires_grad_(True)
        probe, way = torch.randn_like(x), torch.randn_like(x)
        value = (model.differentiable_velocity(x, t, cond) * probe).sum()
        of_x, of_weight = torch.autograd.grad(value, [x, weight])
        h, points = 1e-5, x.detach()
        ends = [(model.velocity(points + k * h * way, t, cond) * probe).sum() for k in (1, -1)]
        torch.testing.assert_close((of_x * way).sum(), (ends[0] - ends[1]) / (2 * h), rtol=1e-6,
                                   atol=0)  # fmt: skip
        turn = torch.randn_like(weight)
        with torch.no_grad():
            weight += h * turn
            ends = [(model.velocity(points, t, cond) * probe).sum()]
            weight -= 2 * h * turn
            ends.append((model.velocity(points, t, cond) * probe).sum())
        torch.testing.assert_close((of_weight * turn).sum(), (ends[0] - ends[1]) / (2 * h),
                                   rtol=1e-6, atol=0)  # fmt: skip
        assert not model.velocity(x, t, cond).requires_grad


@pytest.mark.parametrize("kind", ["epsilon", "rectified"])
def test_velocity_takes_a_time_per_row(kind: str) -> None:
    model = tiny_sd_model(rectified=kind == "rectified")
    x, cond = torch.randn(2, 4, 8, 8), model.encode_prompt(PROMPTS)
    together = model.velocity(x, torch.tensor([0.2, 0.9]), cond)
    for row, t in enumerate((0.2, 0.9)):
        alone = model.velocity(x[row : row + 1], t, cond[row])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_have_a_float32_state(dtype: torch.dtype) -> None:
    exact, model = tiny_sd_model("sample"), tiny_sd_model("sample", dtype=dtype)
    noise = initial_noise(model, [0, 1], 32, 32)
    for solver in ("euler", "dpmpp"):
        arguments = {"num_inference_steps": 3, "solver": solver, "keep_trajectory": True}
        solution = generate_latents(model, PROMPTS, noise, **arguments)
        assert solution.x.dtype == torch.float32
        assert solution.trajectory is not None
        assert not torch.equal(solution.trajectory[1], solution.trajectory[1].to(dtype).float())
        reference = generate_latents(exact, PROMPTS, noise, **arguments).x
        assert (solution.x - reference).square().mean() < 0.01 * reference.square().mean()


def test_the_codec_is_the_stock_one() -> None:
    model = tiny_sd_model()
    vae, images = model.pipeline.vae, torch.rand(2, 3, 32, 40)
    latents = model.encode_image(images)
    assert latents.shape == (2, *model.latent_shape(32, 40)) == (2, 4, 8, 10)
    expected = vae.encode(2 * images - 1).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)
    assert torch.equal(latents, model.encode_image(images))
    raw = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    theirs = model.pipeline.image_processor.postprocess(raw, output_type="pt")
    torch.testing.assert_close(model.decode(latents), theirs, atol=1e-6, rtol=0)


def test_prompts_are_embedded_as_diffusers_does_bit_for_bit() -> None:
    model = tiny_sd_model()
    for prompt in ["", *PROMPTS]:
        embeds, _ = model.pipeline.encode_prompt(prompt, model.device, 1, False)
        cond = model.encode_prompt(["cat", prompt, prompt])  # not alone, and twice
        assert torch.equal(cond.embeds[1:], embeds.repeat(2, 1, 1))
        assert cond.pooled is None
    (clip,) = model.tokenize(PROMPTS)
    assert (clip.name, clip.start, clip.stop) == ("clip", 0, CLIP_LENGTH)
    assert "".join(clip.words[0]) == "tworedapples"
    with pytest.warns(UserWarning, match=f"longer than the {CLIP_LENGTH} tokens clip takes"):
        model.encode_prompt("cat " * 40)


def test_a_network_told_the_guidance_is_told_it_as_diffusers_does() -> None:
    """Students with the guidance as an input, and LCM."""
    model = tiny_sd_model(rectified=True, guidance_embedded=True)
    assert model.guidance_embeds
    model.pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(model, [3, 4], 32, 32)
    latents = {}
    for scale in (1.5, 6.0):
        arguments = {"num_inference_steps": 2, "guidance_scale": scale}
        theirs = model.pipeline(PROMPTS, latents=noise, output_type="latent", **arguments).images
        solution = generate_latents(model, PROMPTS, noise, **arguments)
        torch.testing.assert_close(solution.x, theirs, atol=5e-6, rtol=0)
        assert solution.nfe == 4  # nothing twice
        latents[scale] = solution.x
    assert (latents[1.5] - latents[6.0]).abs().max() > 1e-3


def test_defaults() -> None:
    def wants(model: SDModel) -> tuple[str, int, float]:
        steps, scale = model.default_num_inference_steps, model.default_guidance_scale
        return model.default_solver, steps, scale

    assert wants(tiny_sd_model()) == ("dpmpp", 25, 7.5)
    assert wants(tiny_sd_model(rectified=True)) == ("euler", 25, 1.5)
    told = Metadata(student_steps=(2, 1, 4))
    assert wants(tiny_sd_model(rectified=True, metadata=told)) == ("euler", 1, 1.0)
    told = Metadata(default_num_inference_steps=10, default_guidance_scale=3)
    assert wants(tiny_sd_model(metadata=told)) == ("dpmpp", 10, 3.0)
    model = tiny_sd_model()
    assert (model.default_size, model.factor, model.multiple, model.channels) == (32, 4, 4, 4)
    assert (model.largest, model.shift, model.attention_sites()) == (128, 1.0, [])
    noise = initial_noise(model, [0], 32, 32)
    usual = generate_latents(model, "cat", noise)
    told_all = {"solver": "dpmpp", "num_inference_steps": 25, "guidance_scale": 7.5}
    assert torch.equal(usual.x, generate_latents(model, "cat", noise, **told_all).x)
    assert usual.nfe == 50


def test_our_solvers_begin_where_the_field_does() -> None:
    """A grid by name covers [t_min, 1] in as many steps."""
    model = tiny_sd_model("sample")
    noise = initial_noise(model, [0], 32, 32)
    times: list[float] = []
    arguments: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 1.0}

    def note(step: int, t: Tensor, x: Tensor) -> None:
        times.append(float(t))

    solution = generate_latents(
        model, "cat", noise, grid="uniform", callback_on_step_end=note, keep_trajectory=True,
        **arguments,
    )  # fmt: skip
    assert solution.nfe == 8
    assert times == pytest.approx([model.t_min + (1 - model.t_min) * k / 8 for k in range(1, 9)])
    assert solution.trajectory is not None
    assert torch.equal(solution.trajectory[0], model.initial_state(noise))


def test_models_come_from_folders(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "epsilon": {},
        "v": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
        "rectified": {"rectified": True},
    }
    for name, kind in kinds.items():
        made = tiny_sd_model(**kind)
        made.pipeline.save_pretrained(tmp_path / name)
        write_metadata(Metadata(student_steps=(1, 2)), tmp_path / name)
        model = load(tmp_path / name)
        assert isinstance(model, SDModel)
        assert model.family == "sd"
        assert model.prediction_type == made.prediction_type
        assert (model.t_min, model.t_max) == (made.t_min, made.t_max)
        assert model.metadata.student_steps == (1, 2)
        assert model.weight_hash == made.weight_hash
        noise = initial_noise(model, [5], 32, 32)
        arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "solver": "euler"}
        ours = generate_latents(model, "cat", noise, **arguments)
        # Weights of a file lie otherwise in memory: not to the bit.
        theirs = generate_latents(made, "cat", noise, **arguments)
        torch.testing.assert_close(ours.x, theirs.x, atol=1e-5, rtol=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock = DiffusionPipeline.from_pretrained(tmp_path / name)
        assert stock.scheduler.config.prediction_type == made.pipeline.scheduler.config[
            "prediction_type"
        ]  # fmt: skip


def test_generates_pictures_of_other_sizes() -> None:
    model = tiny_sd_model("sample")
    for height, width in [(32, 48), (64, 32)]:
        (picture,) = generate(model, "cat", height=height, width=width, num_inference_steps=1)
        assert picture.size == (width, height)
    with pytest.raises(InputError, match="multiples of 4, from 4 to 128"):
        generate(model, "cat", height=30)


def with_parts(**parts: Any) -> Any:
    pipeline = tiny_sd()
    return type(pipeline)(**{**pipeline.components, **parts}, requires_safety_checker=False)


def test_pipelines_that_cannot_be_understood() -> None:
    config = tiny_sd().unet.config
    inpainting = UNet2DConditionModel.from_config({**config, "in_channels": 9})
    with pytest.raises(
        InputError, match="takes 9 channels and gives 4, as networks for inpainting"
    ):
        SDModel(with_parts(unet=inpainting), name="x")
    with pytest.raises(InputError, match="EDMEulerScheduler has no table of alphas_cumprod"):
        SDModel(with_parts(scheduler=EDMEulerScheduler()), name="x")
    odd = tiny_scheduler()
    odd.register_to_config(prediction_type="score")
    with pytest.raises(InputError, match="prediction_type is 'score'"):
        SDModel(with_parts(scheduler=odd), name="x")
    shifted = tiny_sd()
    shifted.vae.register_to_config(shift_factor=0.1)
    with pytest.raises(InputError, match="shift_factor"):
        SDModel(shifted, name="x")


def test_another_scheduler_is_another_field() -> None:
    """The scheduler says what the network predicts; nothing of the last one is kept."""
    model = tiny_sd_model()
    before = model.t_min
    model.pipeline.scheduler = tiny_scheduler(beta_end=0.02)
    assert model.t_min < before
    model.pipeline.scheduler = rectified_scheduler()
    assert model.t_min == 0.0
    assert np.isclose(float(model.student_grid(2)[1]), 0.4995)
