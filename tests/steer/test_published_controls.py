"""FTEdit at its published setting and the two-step's preset, against the equations written out.

As `tests.steer.test_published`, with the words' own features besides: what text enters an attention
as is replaced where a word stays, from a token map made here, too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rectiflow as rf
from tests.steer.published import SD3, Values, apart, latents, replaced, seen
from tests.steer.test_published import PROMPTS, forward_steps, image, model, net, reversed_steps

Match = int | None


def matched(source: list[int], target: list[int], length: int) -> list[Match]:
    """Needleman and Wunsch with match 1, mismatch -1 and gap 0, traced back from the end with gaps
    preferred, in the target first. A padding position is matched with its own if that is padding.
    """
    rows, columns = len(source) + 1, len(target) + 1
    score = [[0] * columns for _ in range(rows)]
    for i in range(1, rows):
        for j in range(1, columns):
            same = 1 if source[i - 1] == target[j - 1] else -1
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + same)
    found: list[Match] = [None] * len(target)
    i, j = len(source), len(target)
    while i and j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found[j] = i
    padding = range(len(target), length)
    return found + [place if place >= len(source) else None for place in padding]


@functools.cache
def token_map(net: SD3, source: str, target: str) -> list[Match]:
    """Of the text stream: the CLIPs' positions, then T5's."""
    joined: list[Match] = []
    for tokenizer, length in zip(
        (net.pipe.tokenizer, net.pipe.tokenizer_3), net.segments, strict=True
    ):
        before, after = (
            tokenizer(prompt, truncation=True, max_length=length).input_ids
            for prompt in (source, target)
        )
        start = len(joined)
        joined += [
            None if place is None else start + place for place in matched(before, after, length)
        ]
    return joined


@contextmanager
def texts(attentions: list[nn.Module], held: list[Match], source: Values) -> Iterator[Values]:
    """What text enters attentions as; kept words have it from a source, if one is given."""
    values: Values = {}
    places = torch.tensor([place if place is not None else -1 for place in held])

    def enter(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        own = kwargs["encoder_hidden_states"]
        if source:
            taken = source[attention][:, places.clamp_min(0)]
            own = torch.where((places >= 0)[None, :, None], taken, own)
        values[attention] = own
        return args, kwargs | {"encoder_hidden_states": own}

    handles = [
        attention.register_forward_pre_hook(enter, with_kwargs=True) for attention in attentions
    ]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def steered(
    net: SD3,
    target_state: Tensor,
    source_state: Tensor,
    sigma: float,
    source: str,
    target: str,
    guidance: float,
    holds: bool,
    layers: list[nn.Module],
) -> Tensor:
    """The target's velocity with the source's text features of words that stay, and its values."""
    attentions = [block.attn for block in net.blocks if not block.context_pre_only]
    held = token_map(net, source, target)
    with texts(attentions, held, {}) as words, seen(layers) as values:
        net.u(source_state, sigma, net.text(source))
    with texts(attentions, held, words if holds else {}), replaced(values):
        prompted = net.u(target_state, sigma, net.text(target))
    if guidance == 1:
        return prompted
    empty = net.u(target_state, sigma, net.empty)
    return empty + guidance * (prompted - empty)


def ftedit(net: SD3, x: Tensor, source: str, target: str) -> Tensor:
    """Three evaluations averaged; the source's row is on its path in every step."""
    sigmas, path, layers = net.stock(30), [x], net.value_layers(0.0)
    for _, cleaner, noisier in reversed_steps(sigmas):
        before, found = path[-1], []
        y = before
        for _ in range(3):
            found.append(net.u(y, noisier, net.text(source)))
            y = before + (noisier - cleaner) * found[-1]
        path.append(before + (noisier - cleaner) * sum(found) / 3)
    path, edited = path[::-1], path[-1]
    for i, sigma, following in forward_steps(sigmas):
        shared = layers if i < 4 else []  # 0.15 of 30 steps
        u = steered(net, edited, path[i], sigma, source, target, 2.0, True, shared)
        edited = edited + (following - sigma) * u
    return edited


def two_step(net: SD3, x: Tensor, source: str, target: str) -> Tensor:
    """Leaps over two steps of σ both ways, with x_0 and x_1 given; values of the image alone."""
    sigmas, text = net.shifted(30), net.text(source)
    layers = [block.attn.to_v for block in net.blocks if not block.context_pre_only]
    path = [x, x + sigmas[29] * net.u(x, 0.0, text)]
    for i in range(29, 0, -1):
        u = net.u(path[-1], sigmas[i], text)
        path.append(path[-2] + (sigmas[i - 1] - sigmas[i + 1]) * u)
    path = path[::-1]
    before, edited = path[0], path[1]
    for i in range(1, 30):
        shared = layers if i < 10 else []  # 0.35 and 0.07 of 30 steps
        u = steered(net, edited, path[i], sigmas[i], source, target, 1.0, i < 2, shared)
        before, edited = edited, before + (sigmas[i + 1] - sigmas[i - 1]) * u
    return edited


@pytest.mark.parametrize("number", range(len(PROMPTS)))
@pytest.mark.parametrize(("name", "reference"), [("ftedit", ftedit), ("two-step", two_step)])
@torch.no_grad()
def test_a_preset_is_its_method_as_published(name: str, reference: Any, number: int) -> None:
    shown, wanted = PROMPTS[number]
    found = rf.edit(model("sd3"), image(), source_prompt=shown, prompts=wanted, preset=name).latents
    network = net("sd3")
    x = latents(network, image())
    expected = torch.cat([reference(network, x, shown or "", prompt) for prompt in wanted])
    assert apart(found, expected) < 1e-5
    assert apart(found, x.expand_as(found)) > 1e-2
