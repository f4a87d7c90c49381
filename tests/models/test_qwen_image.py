"""Qwen-Image as a velocity field, held against diffusers' own pipeline."""

from __future__ import annotations

import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline, QwenImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.flow import make_grid
from rectiflow.invert import from_seed
from rectiflow.models import (
    Conditioning,
    GuidedVelocity,
    Metadata,
    QwenImageModel,
    generate_latents,
    initial_noise,
    load,
    write_metadata,
)
from tests.tiny_qwen import DYNAMIC, MEAN, STD, TEXT_LENGTH, tiny_qwen, tiny_qwen_model

PROMPTS = ["two red apples", "a blue dog on the green background"]
NEGATIVES = ["sad face on the left", "car"]
SIZE = (32, 48)


@pytest.fixture(scope="module")
def model() -> QwenImageModel:
    return tiny_qwen_model()


def packed(latents: Tensor) -> Tensor:
    return QwenImagePipeline._pack_latents(latents, *latents.shape)


def unpacked(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return QwenImagePipeline._unpack_latents(tokens, *size, 4)[:, :, 0]


def by_diffusers(
    pipeline: QwenImagePipeline, noise: Tensor, size: tuple[int, int], **given: Any
) -> Any:
    return pipeline(
        height=size[0],
        width=size[1],
        max_sequence_length=TEXT_LENGTH,
        latents=packed(noise),
        **given,
    ).images


@pytest.mark.parametrize("scale", [0.5, 2.5])
@pytest.mark.parametrize("size", [SIZE, (56, 24)])
def test_generates_what_diffusers_generates(
    model: QwenImageModel, size: tuple[int, int], scale: float
) -> None:
    """Prompts and negative prompts of different lengths, which diffusers pads to the longest."""
    steps, noise = 5, initial_noise(model, [3, 4], *size)
    given: dict[str, Any] = {"negative_prompt": NEGATIVES, "num_inference_steps": steps}
    ours = generate_latents(model, PROMPTS, noise, guidance_scale=scale, **given)
    given["true_cfg_scale"] = scale  # diffusers' name for it means the same
    told = generate_latents(model, PROMPTS, noise, guidance_scale=1.0, **given)
    assert torch.equal(told.x, ours.x)
    given["prompt"] = PROMPTS
    theirs = by_diffusers(model.pipeline, noise, size, output_type="latent", **given)
    torch.testing.assert_close(ours.x, unpacked(theirs, size), atol=1e-5, rtol=0)
    pictures = by_diffusers(model.pipeline, noise, size, output_type="pt", **given)
    torch.testing.assert_close(model.decode(ours.x), pictures, atol=1e-5, rtol=0)
    assert ours.nfe == steps * 2 * (2 if scale > 1 else 1)
    assert (ours.x - noise).abs().max() > 0.1  # the network did something


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_diffusers_walks_our_grid_too(model: QwenImageModel, scale: float) -> None:
    """Explicit σ = 1 - t of any grid of ours, with the scheduler's shift out of the way."""
    grid = make_grid([0.0, 0.1, 0.45, 0.8, 1.0])
    noise = initial_noise(model, [0], *SIZE)
    components = model.pipeline.components | {"scheduler": FlowMatchEulerDiscreteScheduler()}
    pipeline = QwenImagePipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    theirs = by_diffusers(
        pipeline,
        noise,
        SIZE,
        prompt=PROMPTS[0],
        negative_prompt="",  # without one diffusers does not guide; ours is the empty one
        sigmas=(1 - grid[:-1]).tolist(),
        true_cfg_scale=scale,
        output_type="latent",
    )
    ours = generate_latents(model, PROMPTS[0], noise, guidance_scale=scale, grid=grid).x
    torch.testing.assert_close(ours, unpacked(theirs, SIZE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (96, 40)])
def test_the_shift_depends_on_the_size(size: tuple[int, int], kind: str) -> None:
    model = tiny_qwen_model(**DYNAMIC, time_shift_type=kind)
    tokens, steps = size[0] * size[1] // 64, 7
    seen: list[Tensor] = []

    def note(pipeline: Any, step: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(timestep)
        return {}

    by_diffusers(
        model.pipeline,
        initial_noise(model, [0], *size),
        size,
        prompt="cat",
        num_inference_steps=steps,
        callback_on_step_end=note,
        output_type="latent",
    )
    grid = make_grid("shifted", steps, shift=model.shift_for(tokens))
    torch.testing.assert_close(torch.stack(seen) / 1000, 1 - grid[:-1], atol=1e-6, rtol=0)
    assert model.shift == model.shift_for(16)


def test_the_shift_of_the_real_checkpoint() -> None:
    """Its scheduler's configuration: 0.5 at 256 tokens, 0.9 at 8192."""
    line = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5}
    model = tiny_qwen_model(**line, max_shift=0.9, use_dynamic_shifting=True, shift_terminal=0.02)
    assert model.shift_for(8192) == pytest.approx(math.exp(0.9))
    assert model.shift_for(256) == pytest.approx(math.exp(0.5))
    assert tiny_qwen_model(shift=2.0).shift_for(64) == 2.0


def test_prompts_are_embedded_as_diffusers_does_bit_for_bit(model: QwenImageModel) -> None:
    for prompt in ["", " ", *PROMPTS]:
        embeds, _ = model.pipeline.encode_prompt(prompt, max_sequence_length=TEXT_LENGTH)
        # Not alone, and twice: neither may change a bit.
        cond = model.encode_prompt(["cat", prompt, prompt])
        count = embeds.shape[1]
        assert cond.embeds.shape == (3, TEXT_LENGTH, 32)
        assert torch.equal(cond.embeds[1:, :count], embeds.repeat(2, 1, 1))
        assert not cond.embeds[1:, count:].any()
        assert cond.mask is not None and cond.mask.dtype == torch.bool
        assert cond.mask[1:].tolist() == [[i < count for i in range(TEXT_LENGTH)]] * 2
        assert cond.pooled is None


def test_distinct_prompts_are_embedded_once(model: QwenImageModel) -> None:
    calls: list[int] = []
    handle = model.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert len(model.encode_prompt(["cat", "dog", "cat", "cat"])) == 4
    finally:
        handle.remove()
    assert len(calls) == 2


@torch.no_grad()
def test_padding_and_company_change_nothing(model: QwenImageModel) -> None:
    """A row is the same alone, without padding and mask, with more of it, and in any batch."""
    x = torch.randn(2, 4, 8, 12)
    t = torch.tensor([0.3, 0.6])
    together = model.velocity(x, t, model.encode_prompt(PROMPTS))
    longer = tiny_qwen_model(metadata={"max_sequence_length": 2 * TEXT_LENGTH})
    padded = longer.velocity(x, t, longer.encode_prompt(PROMPTS))
    torch.testing.assert_close(padded, together, atol=1e-5, rtol=0)
    for row, prompt in enumerate(PROMPTS):
        cond = model.encode_prompt(prompt)
        alone = model.velocity(x[[row]], t[[row]], cond)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)
        embeds, _ = model.pipeline.encode_prompt(prompt)
        bare = model.velocity(x[[row]], t[[row]], Conditioning(embeds))
        torch.testing.assert_close(bare, alone, atol=1e-5, rtol=0)
        # What stands on masked positions is not looked at, and the mask is needed for that.
        assert cond.mask is not None
        noise = torch.where(cond.mask[..., None], cond.embeds, torch.randn(cond.embeds.shape))
        noisy = model.velocity(x[[row]], t[[row]], Conditioning(noise, mask=cond.mask))
        torch.testing.assert_close(noisy, alone, atol=1e-5, rtol=0)
        unmasked = model.velocity(x[[row]], t[[row]], Conditioning(cond.embeds))
        assert (unmasked - alone).abs().max() > 1e-2


def test_combine_keeps_the_norm_of_each_token(model: QwenImageModel) -> None:
    """The pipeline's rule, token by token; at scale 1 nothing but rounding."""
    unguided, guided = torch.randn(2, 2, 4, 6, 4)
    ours = model.combine(unguided, guided, 3.0)
    for row in range(2):
        for top in (0, 2, 4):
            for left in (0, 2):
                cells = (row, slice(None), slice(top, top + 2), slice(left, left + 2))
                free, told = unguided[cells], guided[cells]
                sharp = free + 3 * (told - free)
                expected = sharp * told.norm() / sharp.norm()
                torch.testing.assert_close(ours[cells], expected)
    torch.testing.assert_close(model.combine(unguided, guided, 1.0), guided)


@torch.no_grad()
def test_guidance_needs_half_the_rows_at_one(model: QwenImageModel) -> None:
    rows: list[int] = []
    handle = model.network.register_forward_hook(lambda _m, _args, out: rows.append(len(out[0])))
    x, cond = torch.randn(3, 4, 8, 8), model.encode_prompt("cat")
    try:
        for scale, expected in ((1.0, 3), (4.0, 6)):
            rows.clear()
            GuidedVelocity(model, cond, guidance_scale=scale)(x, torch.tensor(0.2))
            assert rows == [expected]
    finally:
        handle.remove()


def test_images_are_encoded_and_decoded_as_the_pipeline_does(model: QwenImageModel) -> None:
    images = torch.rand(2, 3, 32, 40)
    latents = model.encode_image(images)
    assert latents.shape == (2, *model.latent_shape(32, 40)) == (2, 4, 8, 10)
    assert latents.dtype == torch.float32 and torch.equal(latents, model.encode_image(images))
    pipeline, vae = model.pipeline, model.pipeline.vae
    # diffusers' own pipelines that take an image: this one takes the mode, too.
    editor = QwenImageEditPipeline(**pipeline.components, processor=None)
    frames = editor.image_processor.preprocess(images)[:, :, None]
    expected = editor._encode_vae_image(frames, generator=None)
    torch.testing.assert_close(latents, expected[:, :, 0], atol=1e-5, rtol=0)
    # Decoding is the inverse of that, then the codec; whole pictures are compared above.
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    raw = vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    pixels = pipeline.image_processor.postprocess(raw, output_type="pt")
    torch.testing.assert_close(model.decode(latents), pixels, atol=1e-5, rtol=0)
    one = model.encode_image(images[1:])
    torch.testing.assert_close(latents[1:], one, atol=1e-5, rtol=0)


def test_sizes() -> None:
    model = tiny_qwen_model()
    assert (model.factor, model.patch, model.multiple, model.channels) == (4, 2, 8, 4)
    for height, width in [(8, 8), (104, 8), (24, 96)]:
        (picture,) = rf.generate(model, "cat", height=height, width=width, num_inference_steps=1)
        assert picture.size == (width, height)
    for size in [(33, 32), (32, 12), (0, 32), (32, 1032)]:
        with pytest.raises(InputError, match="multiples of 8, from 8 to 1024"):
            model.latent_shape(*size)
    with pytest.raises(InputError, match="multiples of 8"):
        model.encode_image(torch.rand(1, 3, 30, 32))


def test_the_text_stream_is_the_prompt_and_the_end_of_its_template(model: QwenImageModel) -> None:
    pipeline = model.pipeline
    prompts = ["two red apples", "", " Ünder {the} 😀 cat\n"]
    (text,) = model.tokenize(prompts)
    assert (text.name, text.start, text.length) == ("qwen2.5-vl", 0, TEXT_LENGTH)
    drop = pipeline.prompt_template_encode_start_idx
    for row, prompt in enumerate(prompts):
        ids = pipeline.tokenizer(pipeline.prompt_template_encode.format(prompt)).input_ids[drop:]
        padding = TEXT_LENGTH - len(ids)
        assert text.ids[row] == (ids + [pipeline.tokenizer.pad_token_id] * padding)[:TEXT_LENGTH]
        assert text.pad_mask[row] == ([False] * len(ids) + [True] * padding)[:TEXT_LENGTH]
        mask = model.encode_prompt(prompt).mask
        assert mask is not None and mask[0].tolist() == [not p for p in text.pad_mask[row]]
        assert "".join(text.words[row]) == "".join(prompt.split())
    end = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert pipeline.tokenizer.batch_decode([[i] for i in text.ids[1][:5]]) == end
    assert text.words[0] == ["two", "red", "apples"] + [""] * (TEXT_LENGTH - 3)
    assert text.words[1] == [""] * TEXT_LENGTH
    assert {text.ids[1][0], text.ids[1][2], text.ids[1][-1]} == text.special
    assert not any(text.truncated)


def test_the_template_begins_with_as_many_tokens_as_the_pipeline_drops() -> None:
    pipeline = tiny_qwen()
    before, _ = pipeline.prompt_template_encode.split("{}")
    count = len(pipeline.tokenizer(before).input_ids)
    assert count == pipeline.prompt_template_encode_start_idx == 34


def test_prompts_that_are_too_long_are_cut_with_a_warning(model: QwenImageModel) -> None:
    fitting = " ".join(["red"] * TEXT_LENGTH)  # the template's end is cut, and nothing said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.encode_prompt(fitting).mask.all()
    long = fitting + " apples  on"
    message = f"longer than the {TEXT_LENGTH} tokens qwen2.5-vl takes: 'apples  on' is left out"
    with pytest.warns(UserWarning, match=message) as caught:
        cond = model.encode_prompt([long, "dog", long])
    assert len(caught) == 1 and caught[0].filename == __file__
    embeds, _ = model.pipeline.encode_prompt(long, max_sequence_length=TEXT_LENGTH)
    assert torch.equal(cond.embeds[[0, 2]], embeds.repeat(2, 1, 1))
    assert model.tokenize(long)[0].truncated == [True]


def test_defaults_are_diffusers_own_and_metadata_goes_first() -> None:
    pipeline = tiny_qwen()
    model = QwenImageModel(pipeline)
    signature = inspect.signature(QwenImagePipeline.__call__).parameters
    assert model.default_guidance_scale == signature["true_cfg_scale"].default == 4.0
    steps = signature["num_inference_steps"].default
    assert model.default_num_inference_steps == steps == 50
    assert model.max_sequence_length == signature["max_sequence_length"].default == 512
    assert model.default_size == 128 * 4  # 8 with the real codec: 1024
    assert not model.guidance_embeds and model.text_first and model.cautions == ()
    metadata = Metadata(
        default_guidance_scale=1.5,
        default_num_inference_steps=30,
        default_size=64,
        max_sequence_length=9,
    )
    model = QwenImageModel(pipeline, metadata=metadata)
    assert (model.default_guidance_scale, model.default_num_inference_steps) == (1.5, 30)
    assert (model.default_size, model.max_sequence_length) == (64, 9)


def test_half_precision(model: QwenImageModel) -> None:
    half = tiny_qwen_model(dtype=torch.bfloat16)
    assert half.dtype == half.encode_prompt(PROMPTS).embeds.dtype == torch.bfloat16
    x = initial_noise(half, [0, 1], *SIZE)
    v, exact = (m.velocity(x, 0.5, m.encode_prompt(PROMPTS)) for m in (half, model))
    assert v.dtype == torch.float32
    assert 0 < (v - exact).abs().max() < 0.15 * exact.abs().max()
    solution = generate_latents(half, PROMPTS, x, num_inference_steps=3, keep_trajectory=True)
    assert solution.trajectory is not None and solution.trajectory.dtype == torch.float32
    latents = half.encode_image(torch.rand(1, 3, 32, 32))
    assert latents.dtype == half.decode(latents).dtype == torch.float32


def test_a_picture_that_is_not_square_comes_back_exactly(
    model: QwenImageModel, tmp_path: Path
) -> None:
    picture = Image.fromarray(skimage.data.coffee()).resize((61, 38))
    inversion = rf.invert(model, picture, "a red apple", num_inference_steps=5)
    again = inversion.reconstruct()
    assert again.max_abs_latent <= 1e-4 and again.image.size == picture.size
    assert inversion.reconstruct(False).max_abs_latent > again.max_abs_latent
    saved = inversion.save(tmp_path / "x.safetensors")
    assert rf.Inversion.load(saved, model).reconstruct().max_abs_latent <= 1e-4


def test_a_seed_is_the_path_of_what_it_generates(model: QwenImageModel) -> None:
    given: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0}
    given |= {"seed": 3, "height": 24, "width": 40}
    seeded = from_seed(model, "a cat", **given)
    assert rf.generate(model, "a cat", **given) == seeded.images(seeded.latents)
    assert seeded.reconstruct().max_abs_latent <= 1e-4


def test_saved_and_loaded_is_the_same_model(tmp_path: Path) -> None:
    original = tiny_qwen_model(metadata={"default_num_inference_steps": 3})
    original.pipeline.save_pretrained(tmp_path)
    write_metadata(original.metadata, tmp_path)
    model = rf.load(tmp_path, device="cpu")
    assert isinstance(model, QwenImageModel) and model.family == "qwen-image"
    assert model.weight_hash == original.weight_hash
    assert not any(module.training for module in model.modules.values())
    assert model.tokenize(PROMPTS) == original.tokenize(PROMPTS)
    assert rf.generate(model, "two red apples") == rf.generate(original, "two red apples")
    half = load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == half.pipeline.text_encoder.dtype == torch.bfloat16
    assert half.pipeline.vae.dtype == torch.float32
    # The published text encoder's weights have the names of an older transformers.
    file = tmp_path / "text_encoder/model.safetensors"
    older = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in load_file(file).items()
    }
    assert "model.embed_tokens.weight" in older
    save_file(older, file, {"format": "pt"})
    assert load(tmp_path, device="cpu").weight_hash == original.weight_hash
    older.pop("model.norm.weight")
    save_file(older, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"incomplete \(text_encoder\..*norm.weight is missing\)"):
        load(tmp_path, device="cpu")


def test_generation_leaves_the_pipeline_as_it_was(model: QwenImageModel) -> None:
    config = dict(model.pipeline.scheduler.config)
    rf.generate(model, "cat", num_inference_steps=2)
    assert tiny_qwen_model().weight_hash == model.weight_hash
    assert dict(model.pipeline.scheduler.config) == config
