"""FLUX.1 as a velocity field, held against diffusers' own pipeline."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.flow import make_grid
from rectiflow.models import (
    Conditioning,
    FluxModel,
    GuidedVelocity,
    Metadata,
    generate,
    generate_latents,
    initial_noise,
    load,
    write_metadata,
)
from tests.tiny import CLIP_LENGTH, T5_LENGTH, WORDS
from tests.tiny_flux import tiny_flux, tiny_flux_model

PROMPTS = ["two red apples", "a blue dog on the green background"]
NEGATIVES = ["sad face", "car"]
SIZE = (32, 48)


@pytest.fixture(scope="module", params=["dev", "schnell"])
def model(request: pytest.FixtureRequest) -> FluxModel:
    return tiny_flux_model(schnell=request.param == "schnell")


@pytest.fixture(scope="module")
def dev() -> FluxModel:
    return tiny_flux_model()


def packed(latents: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpacked(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return FluxPipeline._unpack_latents(tokens, *size, 4)


def by_diffusers(pipeline: FluxPipeline, noise: Tensor, size: tuple[int, int], **given: Any) -> Any:
    return pipeline(
        height=size[0],
        width=size[1],
        max_sequence_length=T5_LENGTH,
        latents=packed(noise),
        **given,
    ).images


@pytest.mark.parametrize("true_cfg_scale", [0.5, 2.5])
@pytest.mark.parametrize("size", [SIZE, (56, 24)])
def test_generates_what_diffusers_generates(
    model: FluxModel, size: tuple[int, int], true_cfg_scale: float
) -> None:
    steps, noise = 5, initial_noise(model, [3, 4], *size)
    given: dict[str, Any] = {
        "negative_prompt": NEGATIVES,
        "true_cfg_scale": true_cfg_scale,
        "num_inference_steps": steps,
    }
    if model.guidance_embeds:
        given["guidance_scale"] = 3.0
    ours = generate_latents(model, PROMPTS, noise, **given)
    given["prompt"] = PROMPTS
    theirs = by_diffusers(model.pipeline, noise, size, output_type="latent", **given)
    torch.testing.assert_close(ours.x, unpacked(theirs, size), atol=1e-5, rtol=0)
    pictures = by_diffusers(model.pipeline, noise, size, output_type="pt", **given)
    torch.testing.assert_close(model.decode(ours.x), pictures, atol=1e-5, rtol=0)
    assert ours.nfe == steps * 2 * (2 if true_cfg_scale > 1 else 1)
    assert (ours.x - noise).abs().max() > 0.1  # the network did something


def test_diffusers_walks_our_grid_too(model: FluxModel) -> None:
    """Explicit σ = 1 - t of any grid of ours, with the scheduler's shift out of the way."""
    grid = make_grid([0.0, 0.1, 0.45, 0.8, 1.0])
    noise = initial_noise(model, [0], *SIZE)
    components = model.pipeline.components | {"scheduler": FlowMatchEulerDiscreteScheduler()}
    pipeline = FluxPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    theirs = by_diffusers(
        pipeline,
        noise,
        SIZE,
        prompt=PROMPTS[0],
        sigmas=(1 - grid[:-1]).tolist(),
        guidance_scale=2.0,
        output_type="latent",
    )
    guidance = 2.0 if model.guidance_embeds else 1.0
    ours = generate_latents(model, PROMPTS[0], noise, guidance_scale=guidance, grid=grid).x
    torch.testing.assert_close(ours, unpacked(theirs, SIZE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (96, 40)])
def test_the_shift_depends_on_the_size(size: tuple[int, int], kind: str) -> None:
    model = tiny_flux_model(time_shift_type=kind)
    tokens, steps = size[0] * size[1] // 64, 7
    seen: list[Tensor] = []

    def note(pipeline: Any, step: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(timestep)
        return {}

    noise = initial_noise(model, [0], *size)
    by_diffusers(
        model.pipeline,
        noise,
        size,
        prompt="cat",
        num_inference_steps=steps,
        callback_on_step_end=note,
        output_type="latent",
    )
    grid = make_grid("shifted", steps, shift=model.shift_for(tokens))
    torch.testing.assert_close(torch.stack(seen) / 1000, 1 - grid[:-1], atol=1e-6, rtol=0)
    assert model.shift == model.shift_for(16)


def test_the_shift_of_the_real_checkpoints() -> None:
    dev = {"max_image_seq_len": 4096, "base_image_seq_len": 256, "base_shift": 0.5}
    model = tiny_flux_model(**dev, max_shift=1.15)
    assert model.shift_for(4096) == pytest.approx(math.exp(1.15))
    assert model.shift_for(256) == pytest.approx(math.exp(0.5))
    schnell = tiny_flux_model(schnell=True)
    assert schnell.shift == schnell.shift_for(4096) == 1.0
    assert tiny_flux_model(schnell=True, shift=2.0).shift_for(64) == 2.0


def test_prompts_are_embedded_as_diffusers_does_bit_for_bit(model: FluxModel) -> None:
    for prompt in ["", *PROMPTS]:
        embeds, pooled, _ = model.pipeline.encode_prompt(
            prompt, None, max_sequence_length=T5_LENGTH
        )
        # Not alone, and twice: neither may change a bit.
        cond = model.encode_prompt(["cat", prompt, prompt])
        assert torch.equal(cond.embeds[1:], embeds.repeat(2, 1, 1))
        assert torch.equal(cond.pooled[1:], pooled.repeat(2, 1))


def test_one_call_of_the_network_on_exactly_the_rows_given(dev: FluxModel) -> None:
    calls: list[dict[str, Any]] = []
    handle = dev.network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    noise = initial_noise(dev, [0, 1, 2], *SIZE)
    try:
        plain = generate_latents(dev, "cat", noise, guidance_scale=3.5, num_inference_steps=4)
        both = generate_latents(dev, "cat", noise, true_cfg_scale=2.0, num_inference_steps=2)
    finally:
        handle.remove()
    assert [len(call["hidden_states"]) for call in calls] == [3] * 4 + [6] * 2
    assert (plain.nfe, both.nfe) == (12, 12)
    assert calls[0]["hidden_states"].shape == (3, 4 * 6, 16)
    assert calls[0]["timestep"].tolist() == [1.0] * 3  # σ, not 1000σ
    assert calls[0]["guidance"].tolist() == [3.5] * 3
    assert calls[0]["txt_ids"].shape == (T5_LENGTH, 3) and not calls[0]["txt_ids"].any()
    theirs = FluxPipeline._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(calls[0]["img_ids"], theirs)


def test_packing_is_diffusers(dev: FluxModel) -> None:
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        seen.extend([kwargs["hidden_states"], output[0]])

    x = torch.randn(2, 4, 14, 6)
    handle = dev.network.register_forward_hook(note, with_kwargs=True)
    v = dev.velocity(x, 0.4, dev.encode_prompt(PROMPTS))
    handle.remove()
    assert torch.equal(seen[0], packed(x))
    assert torch.equal(v, -unpacked(seen[1], (56, 24)))


def test_guidance_is_an_input_of_dev_and_alpha_of_schnell() -> None:
    dev, schnell = tiny_flux_model(), tiny_flux_model(schnell=True)
    x, t = torch.randn(2, 4, 8, 12), torch.tensor(0.3)
    cond, negative = dev.encode_prompt(PROMPTS), dev.encode_prompt("car")
    told = dev.velocity(x, t, cond.with_guidance(3.5))
    assert torch.equal(GuidedVelocity(dev, cond, None, 3.5)(x, t), told)
    assert torch.equal(dev.velocity(x, t, cond), dev.velocity(x, t, cond.with_guidance(1.0)))
    assert (told - dev.velocity(x, t, cond)).abs().max() > 0.1
    one, none = told, dev.velocity(x, t, negative.rows(2).with_guidance(3.5))
    both = GuidedVelocity(dev, cond, negative, 3.5, true_cfg_scale=2.0)
    torch.testing.assert_close(both(x, t), 2 * one - none, atol=1e-5, rtol=1e-5)
    assert both.samples_per_row == 2

    cond, negative = schnell.encode_prompt(PROMPTS), schnell.encode_prompt("car")
    one, none = schnell.velocity(x, t, cond), schnell.velocity(x, t, negative.rows(2))
    assert torch.equal(schnell.velocity(x, t, cond.with_guidance(3.5)), one)  # nobody to tell
    for scales in ((2.0, 1.0), (1.0, 2.0)):
        both = GuidedVelocity(schnell, cond, negative, *scales)
        torch.testing.assert_close(both(x, t), 2 * one - none, atol=1e-5, rtol=1e-5)


def test_rows_do_not_depend_on_each_other(dev: FluxModel) -> None:
    """A time, a prompt and a guidance of its own for each."""
    x, cond = torch.randn(2, 4, 8, 8), dev.encode_prompt(PROMPTS)
    cond = Conditioning(cond.embeds, cond.pooled, guidance=torch.tensor([1.0, 4.0]))
    together = dev.velocity(x, torch.tensor([0.2, 0.9]), cond)
    for row, t in enumerate((0.2, 0.9)):
        alone = dev.velocity(x[row : row + 1], t, cond[row])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert not together.requires_grad


@pytest.mark.parametrize("schnell", [False, True])
def test_half_precision_networks_have_a_float32_state(schnell: bool) -> None:
    exact = tiny_flux_model(schnell)
    model = tiny_flux_model(schnell, dtype=torch.bfloat16)
    assert model.dtype == model.encode_prompt(PROMPTS).embeds.dtype == torch.bfloat16
    x = torch.randn(2, 4, 8, 12)
    v, reference = (m.velocity(x, 0.5, m.encode_prompt(PROMPTS)) for m in (model, exact))
    assert v.dtype == torch.float32
    assert (v - reference).square().mean() < 0.01 * reference.square().mean()
    solution = generate_latents(model, PROMPTS, x, num_inference_steps=3, keep_trajectory=True)
    assert solution.x.dtype == torch.float32 and solution.trajectory is not None
    # A state that had passed through half precision would be representable in it.
    assert not torch.equal(solution.trajectory[1], solution.trajectory[1].bfloat16().float())
    latents = model.encode_image(torch.rand(1, 3, 32, 32))
    assert latents.dtype == model.decode(latents).dtype == torch.float32


def test_images_are_encoded_and_decoded_as_the_pipeline_does(dev: FluxModel) -> None:
    images = torch.rand(2, 3, 32, 40)
    latents = dev.encode_image(images)
    assert latents.shape == (2, *dev.latent_shape(32, 40)) == (2, 4, 8, 10)
    assert torch.equal(latents, dev.encode_image(images))
    vae, processor = dev.pipeline.vae, dev.pipeline.image_processor
    raw = vae.encode(processor.preprocess(images)).latent_dist.mode()
    # As diffusers' own image-to-image pipeline of FLUX has it.
    expected = (raw - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    decoded = dev.decode(latents)
    raw = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    torch.testing.assert_close(decoded, processor.postprocess(raw, output_type="pt"))


def test_sizes() -> None:
    model = tiny_flux_model()
    assert (model.factor, model.patch, model.multiple, model.channels) == (4, 2, 8, 4)
    for height, width in [(8, 8), (104, 8), (24, 96)]:
        (picture,) = generate(model, "cat", height=height, width=width, num_inference_steps=1)
        assert picture.size == (width, height)
    for size in [(33, 32), (32, 12), (0, 32), (32, 1032)]:
        with pytest.raises(InputError, match="multiples of 8, from 8 to 1024"):
            model.latent_shape(*size)
    with pytest.raises(InputError, match="multiples of 8"):
        model.encode_image(torch.rand(1, 3, 30, 32))


def test_only_t5_has_positions_in_the_text_stream(dev: FluxModel) -> None:
    prompts = ["two red apples", ""]
    (t5,) = dev.tokenize(prompts)
    assert (t5.name, t5.start, t5.length) == ("t5", 0, T5_LENGTH)
    assert dev.encode_prompt(prompts).embeds.shape[1] == t5.stop
    assert t5.words[0] == ["two", "red", "apples"] + [""] * (T5_LENGTH - 3)
    assert t5.pad_mask[0] == [False] * 4 + [True] * (T5_LENGTH - 4)
    assert t5.ids[0][3] in t5.special and not t5.special & set(t5.ids[0][:3])


def test_prompts_that_are_too_long_are_cut_with_a_warning() -> None:
    model = tiny_flux_model(metadata={"max_sequence_length": 40})
    short = " ".join(WORDS[: CLIP_LENGTH + 2])  # for T5, not for CLIP
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompt(short)
    long = " ".join(["red"] * 40 + ["cat"])
    with pytest.warns(UserWarning, match="longer than the 40 tokens t5 takes: .*cat") as caught:
        cond = model.encode_prompt([long, "dog", long])
    assert len(caught) == 1 and caught[0].filename == __file__
    embeds, _, _ = model.pipeline.encode_prompt(long, max_sequence_length=40)
    assert torch.equal(cond.embeds[:1], embeds)


def test_defaults_come_from_the_metadata_or_the_kind_of_checkpoint() -> None:
    dev, schnell = FluxModel(tiny_flux()), FluxModel(tiny_flux(schnell=True))
    assert (dev.default_guidance_scale, dev.default_num_inference_steps) == (3.5, 28)
    assert (schnell.default_guidance_scale, schnell.default_num_inference_steps) == (1.0, 4)
    assert (dev.max_sequence_length, schnell.max_sequence_length) == (512, 256)
    assert dev.encode_prompt("cat").embeds.shape == (1, 512, 32)
    assert schnell.encode_prompt("cat").embeds.shape == (1, 256, 32)
    assert dev.default_size == 128 * 4
    metadata = Metadata(
        default_guidance_scale=1.5,
        default_num_inference_steps=30,
        default_size=64,
        max_sequence_length=9,
    )
    for pipeline in (dev.pipeline, schnell.pipeline):
        model = FluxModel(pipeline, metadata=metadata)
        assert (model.default_guidance_scale, model.default_num_inference_steps) == (1.5, 30)
        assert (model.default_size, model.max_sequence_length) == (64, 9)


def test_schnell_warns_of_inversion() -> None:
    assert tiny_flux_model().cautions == ()
    (caution,) = tiny_flux_model(schnell=True).cautions
    assert "distilled to generate in 4 steps" in caution and "unreliable" in caution
    # Something else of schnell's shape, made for many steps, is a flow like any other.
    model = tiny_flux_model(schnell=True, metadata={"default_num_inference_steps": 30})
    assert model.cautions == ()


def test_attention_sites_are_all_attentions_in_their_order(model: FluxModel) -> None:
    sites = model.attention_sites()
    assert [site.fused for site in sites] == [False] * 2 + [True] * 3
    order: list[Any] = []
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for number, site in enumerate(sites):
        handles.append(site.attention.register_forward_pre_hook(lambda m, _: order.append(m)))
        for stream, maps in (("image", site.image), ("text", site.text or {})):
            for kind, projection in maps.items():
                handles.append(
                    projection.register_forward_hook(
                        lambda _m, _a, output, name=f"{number} {stream} {kind}": shapes.update(
                            {name: tuple(output.shape)}
                        )
                    )
                )
    model.velocity(torch.randn(1, 4, 8, 12), 0.5, model.encode_prompt("cat"))
    for handle in handles:
        handle.remove()
    assert order == [site.attention for site in sites]
    tokens = {"image": 24, "text": T5_LENGTH}
    expected: dict[str, tuple[int, ...]] = {}
    for kind in ("query", "key", "value"):
        for number in range(2):
            expected |= {f"{number} {s} {kind}": (1, tokens[s], 32) for s in tokens}
        expected |= {f"{n} image {kind}": (1, 24 + T5_LENGTH, 32) for n in range(2, 5)}
    assert shapes == expected


@pytest.mark.parametrize("schnell", [False, True])
def test_saved_and_loaded_is_the_same_model(tmp_path: Path, schnell: bool) -> None:
    original = tiny_flux_model(schnell, metadata={"default_num_inference_steps": 3})
    original.pipeline.save_pretrained(tmp_path)
    write_metadata(original.metadata, tmp_path)
    model = rf.load(tmp_path, device="cpu")
    assert isinstance(model, FluxModel) and model.family == "flux"
    assert model.guidance_embeds != schnell
    assert model.weight_hash == original.weight_hash
    assert not any(module.training for module in model.modules.values())
    assert generate(model, "two red apples") == generate(original, "two red apples")
    half = load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == half.pipeline.text_encoder_2.dtype == torch.bfloat16
    assert half.pipeline.vae.dtype == torch.float32


def test_generation_leaves_the_pipeline_as_it_was(dev: FluxModel) -> None:
    before, config = dev.weight_hash, dict(dev.pipeline.scheduler.config)
    generate(dev, "cat", num_inference_steps=2)
    assert tiny_flux_model().weight_hash == before
    assert dict(dev.pipeline.scheduler.config) == config
