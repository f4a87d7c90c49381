"""Stable Diffusion 3 as a velocity field, held against diffusers' own pipeline."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.flow import make_grid
from rectiflow.models import (
    Conditioning,
    GuidedVelocity,
    Metadata,
    SD3Model,
    generate,
    generate_latents,
    initial_noise,
)
from tests.tiny import CLIP_LENGTH, T5_LENGTH, tiny_model, tiny_sd3

VARIANTS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3-t5": {"t5": True},
    "sd3-tiny-codec": {"tiny_codec": True},
    "sd3.5-medium": {"medium": True},
    "sd3.5-medium-t5": {"medium": True, "t5": True},
    "sd3.5-large-t5": {"large": True, "t5": True},
}
PROMPTS = ["two red apples", "a blue dog on the green background"]


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> SD3Model:
    return tiny_model(**VARIANTS[request.param])


@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_generates_what_diffusers_generates(model: SD3Model, guidance_scale: float) -> None:
    steps, (height, width) = 5, (32, 48)
    noise = initial_noise(model, [3, 4], height, width)
    model.pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": PROMPTS,
        "negative_prompt": ["sad face", "car"],
        "height": height,
        "width": width,
        # The scheduler shifts these: this is the grid that SD3 is meant to be sampled on.
        "sigmas": np.linspace(1, 1 / steps, steps).tolist(),
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "max_sequence_length": T5_LENGTH,
    }
    theirs = model.pipeline(**arguments, latents=noise, output_type="latent").images
    pictures = model.pipeline(**arguments, latents=noise, output_type="pt").images
    solution = generate_latents(
        model,
        PROMPTS,
        noise,
        negative_prompt=["sad face", "car"],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
    )
    torch.testing.assert_close(solution.x, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(solution.x), pictures, atol=1e-5, rtol=0)
    assert solution.nfe == steps * 2 * (2 if guidance_scale > 1 else 1)
    assert (solution.x - noise).abs().max() > 0.1  # the network did something


def test_diffusers_walks_our_grid_too(model: SD3Model) -> None:
    """Explicit σ = 1 - t of any grid of ours, with the scheduler's shift out of the way."""
    grid = make_grid([0.0, 0.1, 0.45, 0.8, 1.0])
    noise = initial_noise(model, [0], 32, 32)
    scheduler = type(model.pipeline.scheduler)(shift=1.0)
    pipeline = type(model.pipeline)(**{**model.pipeline.components, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=PROMPTS[0],
        height=32,
        width=32,
        sigmas=(1 - grid[:-1]).tolist(),
        guidance_scale=2.0,
        max_sequence_length=T5_LENGTH,
        latents=noise,
        output_type="latent",
    ).images
    ours = generate_latents(model, PROMPTS[0], noise, guidance_scale=2.0, grid=grid).x
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_grid_named_diffusers_is_the_one_stock_pipelines_run_on() -> None:
    model = tiny_model()
    model.pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(model, [0], 32, 32)
    theirs = model.pipeline(
        prompt=PROMPTS[0],
        num_inference_steps=6,
        guidance_scale=1.0,
        height=32,
        width=32,
        max_sequence_length=T5_LENGTH,
        latents=noise,
        output_type="latent",
    ).images
    ours = generate_latents(
        model, PROMPTS[0], noise, guidance_scale=1.0, grid="diffusers", num_inference_steps=6
    ).x
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_prompts_are_embedded_as_diffusers_does_bit_for_bit(model: SD3Model) -> None:
    for prompt in ["", *PROMPTS]:
        embeds, _, pooled, _ = model.pipeline.encode_prompt(
            prompt,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_LENGTH,
        )
        # Not alone, and twice: neither may change a bit.
        cond = model.encode_prompt(["cat", prompt, prompt])
        assert torch.equal(cond.embeds[1:], embeds.repeat(2, 1, 1))
        assert torch.equal(cond.pooled[1:], pooled.repeat(2, 1))


def test_distinct_prompts_are_embedded_once() -> None:
    model = tiny_model(t5=True)
    calls = []
    for encoder in ("text_encoder", "text_encoder_3"):
        getattr(model.pipeline, encoder).register_forward_hook(lambda *_: calls.append(1))
    assert len(model.encode_prompt(["cat", "dog", "cat", "cat"])) == 4
    assert len(calls) == 2 * 2


def test_guidance_one_costs_half() -> None:
    model = tiny_model()
    rows: list[int] = []
    model.network.register_forward_hook(lambda _module, _args, output: rows.append(len(output[0])))
    noise = initial_noise(model, [0, 1, 2], 32, 32)
    totals = {}
    for guidance_scale in (1.0, 2.0):
        rows.clear()
        solution = generate_latents(
            model, "cat", noise, guidance_scale=guidance_scale, num_inference_steps=4
        )
        totals[guidance_scale] = sum(rows)
        assert solution.nfe == sum(rows)
        assert len(rows) == 4  # one call per evaluation, guided or not
    assert totals == {1.0: 12, 2.0: 24}


def test_guidance_is_the_stated_combination() -> None:
    model = tiny_model(t5=True)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.3)
    cond, negative = model.encode_prompt(PROMPTS), model.encode_prompt("car")
    one, none = model.velocity(x, t, cond), model.velocity(x, t, negative.rows(2))
    guided = GuidedVelocity(model, cond, negative, 2.5)(x, t, 0)
    torch.testing.assert_close(guided, 2.5 * one - 1.5 * none, atol=1e-5, rtol=1e-5)
    assert torch.equal(GuidedVelocity(model, cond)(x, t, 0), one)
    of_empty = GuidedVelocity(model, cond, guidance_scale=2.0)(x, t, 0)
    empty = model.velocity(x, t, model.encode_prompt("").rows(2))
    torch.testing.assert_close(of_empty, 2 * one - empty, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="2 prompts for 3 images"):
        GuidedVelocity(model, cond)(torch.randn(3, 4, 8, 8), t, 0)


def test_velocity_takes_a_time_per_row() -> None:
    model = tiny_model()
    x, cond = torch.randn(2, 4, 8, 8), model.encode_prompt(PROMPTS)
    together = model.velocity(x, torch.tensor([0.2, 0.9]), cond)
    for row, t in enumerate((0.2, 0.9)):
        alone = model.velocity(x[row : row + 1], t, cond[row])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert not together.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_have_a_float32_state(dtype: torch.dtype) -> None:
    exact, model = tiny_model(t5=True), tiny_model(t5=True, dtype=dtype)
    assert model.dtype == dtype
    cond = model.encode_prompt(PROMPTS)
    assert cond.embeds.dtype == dtype
    noise = initial_noise(model, [0, 1], 32, 32)
    solution = generate_latents(model, PROMPTS, noise, num_inference_steps=3, keep_trajectory=True)
    assert solution.x.dtype == torch.float32
    assert solution.trajectory is not None
    # A state that had passed through half precision would be representable in it.
    assert not torch.equal(solution.trajectory[1], solution.trajectory[1].to(dtype).float())
    reference = generate_latents(exact, PROMPTS, noise, num_inference_steps=3).x
    assert (solution.x - reference).square().mean() < 0.01 * reference.square().mean()
    latents = model.encode_image(torch.rand(1, 3, 32, 32))
    assert latents.dtype == model.decode(latents).dtype == torch.float32


@pytest.mark.parametrize("tiny_codec", [False, True])
def test_encoding_is_deterministic_and_normalised(tiny_codec: bool) -> None:
    model = tiny_model(tiny_codec=tiny_codec)
    images = torch.rand(2, 3, 32, 40)
    latents = model.encode_image(images)
    assert latents.shape == (2, *model.latent_shape(32, 40)) == (2, 4, 8, 10)
    assert torch.equal(latents, model.encode_image(images))
    vae = model.pipeline.vae
    if tiny_codec:
        raw = vae.encode(2 * images - 1).latents
    else:
        raw = vae.encode(2 * images - 1).latent_dist.mean
    expected = (raw - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    decoded = model.decode(latents)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0 and decoded.max() <= 1


@pytest.mark.parametrize("size", [(33, 32), (32, 12), (0, 32), (104, 32), (32, -8)])
def test_sizes_the_network_cannot_take(size: tuple[int, int]) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="multiples of 8, from 8 to 96"):
        model.latent_shape(*size)
    with pytest.raises(InputError, match="multiples of 8, from 8 to 96"):
        generate(model, "cat", height=size[0], width=size[1])


def test_sizes_it_can() -> None:
    model = tiny_model()
    for height, width in [(8, 8), (96, 8), (24, 96)]:
        (picture,) = generate(model, "cat", height=height, width=width, num_inference_steps=1)
        assert picture.size == (width, height)
    with pytest.raises(InputError, match="multiples of 8"):
        model.encode_image(torch.rand(1, 3, 30, 32))


def test_tokens_are_laid_out_as_the_embedding_is() -> None:
    for t5 in (False, True):
        model = tiny_model(t5=t5)
        prompts = ["Two red apples", ""]
        clip, last = model.tokenize(prompts)
        assert (clip.name, clip.start, clip.length) == ("clip", 0, CLIP_LENGTH)
        assert (last.name, last.start, last.length) == ("t5", CLIP_LENGTH, T5_LENGTH)
        assert model.encode_prompt(prompts).embeds.shape[1] == last.stop
        assert clip.words[0][:5] == ["", "Two", "red", "apples", ""]
        assert clip.pad_mask[0] == [False] * 5 + [True] * (CLIP_LENGTH - 5)
        assert clip.pad_mask[1] == [False] * 2 + [True] * (CLIP_LENGTH - 2)
        assert {clip.ids[0][0], clip.ids[0][4]} <= clip.special
        assert not clip.special & set(clip.ids[0][1:4])
        assert all(len(ids) == CLIP_LENGTH for ids in clip.ids)
        if t5:
            # "Two" is not in T5's vocabulary, which knows cases: letters, and one unknown.
            assert "".join(last.words[0]).startswith("Twored")
            assert last.pad_mask[1] == [False] + [True] * (T5_LENGTH - 1)
        else:
            assert all(all(padding) for padding in last.pad_mask)
            assert set(last.ids[0]) <= last.special


def test_unknown_characters_stand_for_text() -> None:
    _, t5 = tiny_model(t5=True).tokenize("☃ cat")
    unknown = t5.words[0].index("☃")
    assert t5.ids[0][unknown] not in t5.special


def test_words_spell_the_prompt() -> None:
    prompt = "two Café-lemons, naïve ☃ zebras 12"
    clip, _ = tiny_model().tokenize(prompt)
    assert clip.truncated == [True]
    assert "".join(clip.words[0]) + clip.cut[0].replace(" ", "") == prompt.replace(" ", "")


def test_prompts_that_are_too_long_are_cut_with_a_warning() -> None:
    model = tiny_model(t5=True)
    long = "red apples and " * 12 + "a cat"
    with pytest.warns(UserWarning) as caught:
        cond = model.encode_prompt([long, "cat", long])
    assert len(caught) == 2  # once for CLIP, once for T5; not for each copy of the prompt
    assert f"longer than the {CLIP_LENGTH} tokens clip takes" in str(caught[0].message)
    assert f"longer than the {T5_LENGTH} tokens t5 takes" in str(caught[1].message)
    embeds, *_ = model.pipeline.encode_prompt(
        long, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    assert torch.equal(cond.embeds[:1], embeds)
    clip, t5 = model.tokenize([long, "cat"])
    assert clip.truncated == t5.truncated == [True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompt("a cat")


@pytest.mark.parametrize("t5", [False, True])
@pytest.mark.parametrize("length", [1, 9, None])
def test_max_sequence_length_is_the_metadatas(t5: bool, length: int | None) -> None:
    model = SD3Model(tiny_sd3(t5=t5), metadata=Metadata(max_sequence_length=length))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no prompt fits into one token
        cond = model.encode_prompt("cat")
    assert cond.embeds.shape[1] == CLIP_LENGTH + (256 if length is None else length)
    assert model.tokenize("cat")[-1].stop == cond.embeds.shape[1]


def test_defaults_come_from_the_metadata_or_the_kind_of_checkpoint() -> None:
    def recommended(**kwargs: Any) -> tuple[float, int]:
        model = SD3Model(tiny_sd3(**kwargs))
        assert (model.shift, model.default_size) == (3.0, 32)
        return model.default_guidance_scale, model.default_num_inference_steps

    assert recommended() == (7.0, 28)
    assert recommended(medium=True) == (4.5, 40)
    assert recommended(large=True) == (3.5, 28)
    metadata = Metadata(default_guidance_scale=1.0, default_num_inference_steps=30, default_size=64)
    model = SD3Model(tiny_sd3(shift=1.5), metadata=metadata)
    assert (model.default_guidance_scale, model.default_num_inference_steps) == (1.0, 30)
    assert (model.shift, model.default_size) == (1.5, 64)


def test_hook_points() -> None:
    model = tiny_model(medium=True)
    sites = model.attention_sites()
    blocks = list(model.network.transformer_blocks)[:-1]
    assert [site.attention for site in sites] == [block.attn for block in blocks]
    assert not model.text_first and not any(site.fused for site in sites)
    seen: dict[str, torch.Tensor] = {}

    def attention(_module: Any, _args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        seen["text"], seen["image"] = kwargs["encoder_hidden_states"], kwargs["hidden_states"]

    handles = [sites[0].attention.register_forward_pre_hook(attention, with_kwargs=True)]
    for stream, projections in (("image", sites[0].image), ("text", sites[0].text)):
        assert projections is not None and set(projections) == {"query", "key", "value"}
        for kind, projection in projections.items():
            handles.append(
                projection.register_forward_hook(
                    lambda _m, _a, output, name=f"{stream} {kind}": seen.update({name: output})
                )
            )
    model.velocity(torch.randn(1, 4, 8, 12), 0.5, model.encode_prompt("cat"))
    for handle in handles:
        handle.remove()
    text, image = (1, CLIP_LENGTH + T5_LENGTH, 32), (1, 4 * 6, 32)
    shapes = {name: tuple(tensor.shape) for name, tensor in seen.items()}
    assert len(shapes) == 8
    assert all(shape == (text if "text" in name else image) for name, shape in shapes.items())
    for stream, projections in (("image", sites[0].image), ("text", sites[0].text)):
        for kind, projection in (projections or {}).items():  # which is which
            torch.testing.assert_close(projection(seen[stream]), seen[f"{stream} {kind}"])


def test_the_weight_hash_sees_every_weight() -> None:
    same = tiny_model(t5=True).weight_hash
    assert tiny_model(t5=True).weight_hash == same and len(same) == 64
    assert tiny_model(t5=True, seed=1).weight_hash != same
    assert tiny_model(t5=True, dtype=torch.bfloat16).weight_hash != same
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        model = tiny_model(t5=True)
        weight = list(getattr(model.pipeline, part).parameters())[-1]
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        assert model.weight_hash != same, part
    model = tiny_model(t5=True)
    model.pipeline.vae.to(memory_format=torch.channels_last)
    assert model.weight_hash == same


def test_conditioning_rows() -> None:
    cond = Conditioning(torch.arange(3.0).view(3, 1, 1), torch.arange(3.0).view(3, 1))
    assert cond[[2, 0]].pooled.flatten().tolist() == [2, 0]
    assert cond[1:].embeds.flatten().tolist() == [1, 2]
    assert cond[-1].pooled.tolist() == [[2]]
    assert cond.repeat(2).pooled.flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert Conditioning.cat([cond[0], cond]).embeds.flatten().tolist() == [0, 0, 1, 2]
    with pytest.raises(InputError, match="no prompt"):
        tiny_model().encode_prompt([])
