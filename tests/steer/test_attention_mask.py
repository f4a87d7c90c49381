"""Masks from attention: against attention written out, and against what networks themselves do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.invert import Preset, get_preset
from rectiflow.models import FlowModel, SD3Model
from rectiflow.models.base import AttentionSite
from rectiflow.models.prompts import Conditioning
from rectiflow.steer import EditTask, align, edit_latents
from rectiflow.steer.attention_mask import AttentionMask, changed_tokens
from rectiflow.steer.controls import Rows, controlled
from tests.steer import edits
from tests.steer.edits import GRID, OWNERS, SOURCES, TARGETS, counting, random_path
from tests.steer.reference import heads, reference_velocity
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model
from tests.tiny_qwen import tiny_qwen_model

PATH = random_path()
DELETION = 1
"""The number of the target that has no word of its own."""


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model(t5=True, medium=True)


def settings(**given: Any) -> Preset:
    chosen: dict[str, Any] = {
        "num_inference_steps": 4,
        "scheme": "euler",
        "compensate": "source",
        "adaln_ratio": 0.0,
        "attention_ratio": 0.0,
        "mask_threshold": 0.5,
        "mask_from": "attention",
    }
    return get_preset(Preset(reference="none"), **(chosen | given))


def work(model: FlowModel, numbers: tuple[int, ...] = (0, 1, 2)) -> EditTask:
    """The edits of these numbers, their changed words known."""
    owners, targets = [OWNERS[n] for n in numbers], [TARGETS[n] for n in numbers]
    plain = edits.task(model, PATH, targets, owners)
    words = [
        changed_tokens(model, SOURCES[owner], target, token_map)
        for owner, target, token_map in zip(owners, targets, plain.token_maps, strict=True)
    ]
    changed, deleted = (torch.stack(part) for part in zip(*words, strict=True))
    return dataclasses.replace(plain, changed=changed, deleted=deleted)


def test_the_words_that_changed() -> None:
    model = tiny_model(t5=True)

    def words(source: str, target: str) -> tuple[list[str], list[str]]:
        segments = model.tokenize([source, target])
        found = changed_tokens(model, source, target, align(model, source, target).token_map)
        pieces = [[w for s in segments for w in s.words[row]] for row in (1, 0)]
        return tuple(  # type: ignore[return-value]
            [piece for piece, chosen in zip(side, places, strict=True) if chosen]
            for side, places in zip(pieces, found, strict=True)
        )

    # Of both tokenizers; no padding and no special token, although prompts differ in length.
    assert words("a red apple", "a green apple") == (["green"] * 2, ["red"] * 2)
    assert words("a red apple on the background", "a apple") == (
        [],
        ["red", "on", "the", "background"] * 2,
    )
    assert words("a apple", "a apple and two cat") == (["and", "two", "cat"] * 2, [])
    assert words("a cat", "a cat") == ([], [])


@torch.no_grad()
def written_out(model: SD3Model, x: Tensor, prompt: str, tokens: Tensor) -> Tensor:
    """``[n]``: what goes to the tokens, of attention computed by hand in every block but the last,
    whose text stream ends."""
    made: list[tuple[str, str, Tensor]] = []

    def keep(kind: str, stream: str, features: Tensor) -> Tensor:
        made.append((kind, stream, features))
        return features

    reference_velocity(
        model, x, float(GRID[0]), model.encode_prompt(prompt), lambda features: features, keep
    )
    blocks = model.network.transformer_blocks[:-1]
    assert len(made) == 6 * len(blocks)
    shares = []
    for number, block in enumerate(blocks):
        found = {made[k][:2]: made[k][2] for k in range(6 * number, 6 * number + 6)}
        attention = block.attn
        layers = {
            ("query", "image"): attention.norm_q,
            ("key", "image"): attention.norm_k,
            ("key", "text"): attention.norm_added_k,
        }
        q, k, words = (
            rms(heads(found[part], attention.heads), layer) for part, layer in layers.items()
        )
        scores = torch.cat([q @ k.mT, q @ words.mT], -1) / 16**0.5  # image first, as SD3 has it
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        shares.append(weights[0, :, :, k.shape[2] :][..., tokens].sum(-1).mean(0))
    return torch.stack(shares).mean(0)


def rms(x: Tensor, layer: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight


def cut(heat: Tensor, threshold: float) -> Tensor:
    """Of token cells ``[4, 6]``, by hand: from the least to the most, smoothed, a ramp."""
    heat = heat - heat.min()
    wide = F.pad(heat[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    shifted = [wide[a : a + 4, b : b + 6] for a in range(3) for b in range(3)]
    smooth = torch.stack(shifted).mean(0)
    smooth = smooth / smooth.max()
    ramp = ((smooth - threshold / 2) / (threshold / 2)).clamp(0, 1)
    return F.interpolate(ramp[None, None], size=(8, 12), mode="bilinear")[0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("numbers", [(0, 1, 2), (0,), (1,), (2, 0)])
def test_the_mask_is_attention_written_out(
    model: SD3Model, guidance: float, numbers: tuple[int, ...]
) -> None:
    task = work(model, numbers)
    assert task.changed is not None and task.deleted is not None
    edited = edit_latents(model, task, settings(guidance_scale=guidance))
    assert edited.mask is not None and edited.mask.shape == (len(numbers), 1, 8, 12)
    for row, number in enumerate(numbers):
        owner = OWNERS[number]
        prompt, tokens = TARGETS[number], task.changed[row]
        if number == DELETION:  # looked for where they are, in the source
            prompt, tokens = SOURCES[owner], task.deleted[row]
        assert tokens.any()
        heat = written_out(model, PATH.trajectory[0, [owner]], prompt, tokens)
        expected = cut(heat.unflatten(0, (4, 6)), 0.5)
        torch.testing.assert_close(edited.mask[row], expected, atol=2e-3, rtol=0)
        assert 0 < expected.mean() < 1


@pytest.mark.parametrize("guidance", [1, 2])
def test_it_takes_no_sample_but_for_deletions(model: SD3Model, guidance: int) -> None:
    for numbers, more in (((0, 2), 0), ((0, 1, 2), 2)):  # both sources, in the first of 4 steps
        preset = settings(guidance_scale=float(guidance))
        with counting(model) as calls:
            edited = edit_latents(model, work(model, numbers), preset)
        assert edited.nfe == sum(calls) == 4 * guidance * len(numbers) + more
        # Where the sources' rows run for the controls it takes none at all.
        controls = dataclasses.replace(preset, adaln_ratio=0.5)
        free = dataclasses.replace(controls, mask_from="velocity", mask_threshold=None)
        found = [edit_latents(model, work(model, numbers), p).nfe for p in (controls, free)]
        assert found[0] == found[1]


@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_outside_of_it_the_source_stays(model: SD3Model, compensate: str) -> None:
    preset = settings(
        compensate=compensate,
        adaln_ratio=0.5,
        attention_ratio=0.5,
        guidance_scale=2.0,
        mask_threshold=1.0,
    )
    task = work(model)
    edited = edit_latents(model, task, preset)
    assert edited.mask is not None
    outside = (edited.mask == 0).expand_as(edited.latents)
    image = PATH.trajectory[-1][list(OWNERS)]
    assert outside.any() and not outside.all()
    assert torch.equal(edited.latents[outside], image[outside])
    assert (edited.latents - image).abs().amax((1, 2, 3)).min() > 1e-2


def test_equal_prompts_have_nothing_to_edit(model: SD3Model) -> None:
    plain = edits.task(model, PATH, [SOURCES[0]], [0])
    changed, deleted = changed_tokens(model, SOURCES[0], SOURCES[0], plain.token_maps[0])
    assert not changed.any() and not deleted.any()
    task = dataclasses.replace(plain, changed=changed[None], deleted=deleted[None])
    edited = edit_latents(model, task, settings())
    assert edited.mask is not None and not edited.mask.any()
    assert torch.equal(edited.latents, PATH.trajectory[-1][[0]])


# What a family's network computes: values that are 1 at the chosen text tokens and 0 elsewhere come
# out of attention as the weights of those tokens.


@contextmanager
def shown(site: AttentionSite, text: int, text_first: bool, tokens: Tensor) -> Iterator[list[Any]]:
    """The weights ``[B, n]`` that the site's attention gives to the tokens."""
    seen: list[Any] = []
    attention: Any = site.attention

    def values(module: Any, args: Any, output: Tensor) -> Tensor:
        result = torch.zeros_like(output)
        if site.fused:
            assert text_first
            result[:, :text][:, tokens] = 1
        return result

    def words(module: Any, args: Any, output: Tensor) -> Tensor:
        result = torch.zeros_like(output)
        result[:, tokens] = 1
        return result

    def out(module: Any, args: Any) -> None:
        seen.append(args[0].mean(-1))

    def fused(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output[:, text:].mean(-1))

    with ExitStack() as stack:
        stack.callback(attention.to_v.register_forward_hook(values).remove)
        if site.fused:
            stack.callback(attention.register_forward_hook(fused).remove)
        else:
            stack.callback(attention.add_v_proj.register_forward_hook(words).remove)
            stack.callback(attention.to_out[0].register_forward_pre_hook(out).remove)
        yield seen


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen"])
@torch.no_grad()
def test_it_is_what_each_network_computes(family: str) -> None:
    """With its norms, its rotations and its padding, in double and in single blocks."""
    made: dict[str, Callable[[], FlowModel]] = {
        "sd3": lambda: tiny_model(t5=True, medium=True),
        "flux": tiny_flux_model,
        "qwen": tiny_qwen_model,
    }
    model = made[family]()
    prompts = ["a red apple", "a green lemon on the background"]
    cond: Conditioning = model.encode_prompt(prompts)
    x = torch.randn(2, model.channels, 8, 12, generator=torch.Generator().manual_seed(1))
    source, target = prompts
    words = changed_tokens(model, source, target, align(model, source, target).token_map)
    changed, deleted = words[0][None], words[1][None]
    expected = []
    gathered = AttentionMask(model, 0.5, 4, changed, deleted, x.shape)
    sites = sorted({point.site for point in gathered.points})
    if family == "flux":
        assert {model.attention_sites()[site].fused for site in sites} == {False, True}
    for site in sites:
        tapped = model.attention_sites()[site]
        with shown(tapped, cond.embeds.shape[1], model.text_first, changed[0]) as seen:
            model.velocity(x, 0.4, cond)
        (weights,) = seen
        expected.append(weights[1])
    with controlled(model, [], gathered) as network:
        v = network.velocity(x, torch.tensor(0.4), cond, 0, Rows((1,), (0,), (0,)))
    assert torch.equal(v, model.velocity(x, 0.4, cond))  # looking changes nothing
    found = gathered._sum[0] / gathered._count
    torch.testing.assert_close(found, torch.stack(expected).mean(0), atol=1e-5, rtol=1e-4)
    assert found.std() > 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_threshold": None}, "mask_from is 'attention' without a mask_threshold"),
        ({"mask_from": "eyes"}, "mask_from is 'eyes'; one of: velocity, attention"),
        ({"method": "uni_edit"}, "has no effect on the scheme euler with the method uni_edit"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_preset(
            Preset(reference="none", scheme="euler"),
            **({"mask_from": "attention", "mask_threshold": 0.5} | given),
        )
