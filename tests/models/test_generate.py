"""Generation: noise that depends on its own seed alone, batches, arguments that do not fit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from rectiflow.errors import InputError, WorkError
from rectiflow.flow import make_grid
from rectiflow.models import FlowModel, SD3Model, generate, generate_latents, initial_noise, to_pil
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model
from tests.tiny_qwen import tiny_qwen_model


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return len(a) == len(b) and all(
        np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1
        for x, y in zip(a, b, strict=True)
    )


def test_noise_depends_on_its_own_seed_alone(model: SD3Model) -> None:
    noise = initial_noise(model, [5, 6, 7], 32, 24)
    assert noise.dtype == torch.float32 and noise.shape == (3, 4, 8, 6)
    assert torch.equal(noise[1:2], initial_noise(model, [6], 32, 24))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    assert torch.equal(noise, initial_noise(model, generators, 32, 24))


def test_prompts_may_be_embedded_already(model: SD3Model) -> None:
    noise = initial_noise(model, [1, 2], 32, 32)
    for prompts in ("cat", ["cat", "two red apples"]):
        given = {"num_inference_steps": 2, "guidance_scale": 2.0}
        found = generate_latents(model, model.encode_prompt(prompts), noise, **given)
        expected = generate_latents(model, prompts, noise, **given)
        assert torch.equal(found.x, expected.x) and found.nfe == expected.nfe == 8
    with pytest.raises(InputError, match="3 prompts for 2 images"):
        generate_latents(model, model.encode_prompt(["a", "b", "c"]), noise)


def test_items_do_not_depend_on_their_batch(model: SD3Model) -> None:
    prompts = ["cat", "two red apples", "a dog", "lemon"]
    together = generate(model, prompts, seed=3, num_inference_steps=3, guidance_scale=2.0)
    for i, prompt in enumerate(prompts):
        alone = generate(model, prompt, seed=3 + i, num_inference_steps=3, guidance_scale=2.0)
        assert same(alone, together[i : i + 1])
    parts = generate(
        model, prompts, seed=3, num_inference_steps=3, guidance_scale=2.0, batch_size=3
    )
    assert same(parts, together)
    noise = initial_noise(model, [3, 4, 5, 6], 32, 32)
    latents = generate_latents(model, prompts, noise, num_inference_steps=3).x
    single = generate_latents(model, prompts[2], noise[2:3], num_inference_steps=3).x
    torch.testing.assert_close(latents[2:3], single, atol=1e-5, rtol=0)


def test_seeds_generators_and_latents_are_three_ways_to_say_the_same(model: SD3Model) -> None:
    prompts = ["cat", "dog"]
    by_seed = generate(model, prompts, seed=8, num_inference_steps=2)
    assert by_seed == generate(model, prompts, seed=[8, 9], num_inference_steps=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    assert by_seed == generate(model, prompts, generator=generators, num_inference_steps=2)
    noise = initial_noise(model, [8, 9], 32, 32)
    assert by_seed == generate(model, prompts, latents=noise, num_inference_steps=2)
    assert not same(by_seed, generate(model, prompts, seed=9, num_inference_steps=2))
    single = generate(
        model, "cat", generator=torch.Generator().manual_seed(8), num_inference_steps=2
    )
    assert same(single, by_seed[:1])


def test_solvers_grids_and_callbacks(model: SD3Model) -> None:
    steps: list[int] = []
    generate(
        model,
        ["cat", "dog"],
        solver="heun",
        grid="uniform",
        num_inference_steps=3,
        callback_on_step_end=lambda step, t, x: steps.append(step),
        batch_size=1,
    )
    assert steps == [0, 1, 2, 0, 1, 2]
    noise = initial_noise(model, [0], 32, 32)
    assert generate_latents(model, "cat", noise, grid=[0.0, 0.5, 1.0], guidance_scale=1).nfe == 2
    pictures = generate(
        model,
        "cat",
        latents=noise,
        num_inference_steps=2,
        callback_on_step_end=lambda step, t, x: torch.zeros_like(x),
    )
    assert pictures == to_pil(model.decode(torch.zeros_like(noise)))


def test_negative_prompts_matter_only_under_guidance(model: SD3Model) -> None:
    def run(negative: str | list[str] | None, guidance_scale: float) -> list[Image.Image]:
        return generate(
            model,
            ["cat", "dog"],
            negative_prompt=negative,
            guidance_scale=guidance_scale,
            num_inference_steps=3,
        )

    assert run(None, 3.0) == run("", 3.0) == run(["", ""], 3.0)
    assert not same(run("red car", 3.0), run(None, 3.0))
    assert run("red car", 1.0) == run(None, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": [1, 2, 3]}, "3 seeds for 2 prompts"),
        ({"generator": torch.Generator()}, "1 generators for 2 prompts"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "1 latents for 2 prompts"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ({"solver": "rk5"}, "unknown solver 'rk5'"),
        ({"grid": "log"}, "unknown grid 'log'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_arguments_that_do_not_fit(
    model: SD3Model, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, ["cat", "dog"], **arguments)  # type: ignore[arg-type]


def test_no_prompt(model: SD3Model) -> None:
    with pytest.raises(InputError, match="no prompt"):
        generate(model, [])


def test_a_network_that_breaks_is_named() -> None:
    model = tiny_model(dtype=torch.float16)
    with torch.no_grad():
        model.network.proj_out.weight.fill_(6e4)
    with pytest.raises(WorkError, match=r"tiny returned numbers that are not finite in .*float16"):
        generate(model, "cat", num_inference_steps=2, guidance_scale=1.0)


def test_nothing_is_left_behind(model: SD3Model) -> None:
    state = torch.get_rng_state()
    generate(model, "cat", num_inference_steps=2)
    assert torch.equal(state, torch.get_rng_state())


def test_fields_of_flows_begin_at_noise_and_have_a_grid_for_students() -> None:
    model = tiny_model()
    x = torch.randn(1, 4, 8, 8)
    assert (model.t_min, model.t_max, model.prediction_type) == (0.0, 1.0, "velocity")
    assert model.diffusion_path is None and model.initial_state(x) is x
    assert torch.equal(model.student_grid(4), make_grid("shifted", 4, shift=3.0))
    arguments = {"num_inference_steps": 3, "guidance_scale": 1.0}
    usual = generate_latents(model, "cat", x, **arguments)
    assert torch.equal(usual.x, generate_latents(model, "cat", x, grid="student", **arguments).x)


@pytest.mark.parametrize("family", [tiny_model, tiny_flux_model, tiny_qwen_model])
def test_fields_can_be_differentiated(family: Callable[[], FlowModel]) -> None:
    """Along a line, against a difference in float32."""
    model = family()
    shape = (1, *model.latent_shape(model.default_size, model.default_size))
    cond = model.encode_prompt("a cat")
    x, way, probe = (torch.randn(shape, requires_grad=k == 0) for k in range(3))
    value = (model.differentiable_velocity(x, 0.4, cond) * probe).sum()
    (gradient,) = torch.autograd.grad(value, [x])
    h, point = 2e-3, x.detach()
    ends = [(model.velocity(point + k * h * way, 0.4, cond) * probe).sum() for k in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close((gradient * way).sum(), slope, rtol=2e-2, atol=2e-2)
    assert not model.velocity(x, 0.4, cond).requires_grad
