"""FLUX.1's network written out, with places to replace features: an oracle for tests.

No hooks and no processors of diffusers: attention is a softmax, AdaLN a scale and a shift, a
rotary position the product of complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from rectiflow.models import Conditioning, FluxModel
from tests.steer.reference import heads, norm, softmax_attention

Features = Callable[[int, str, str, Tensor], Tensor]
"""Given the number of the attention, what is replaced ("text", "query", "key" or "value"), of which
stream, and the features of all rows."""


def untouched(site: int, kind: str, stream: str, features: Tensor) -> Tensor:
    return features


@torch.no_grad()
def reference_velocity(
    model: FluxModel, x: Tensor, t: float, cond: Conditioning, replace: Features = untouched
) -> Tensor:
    """`model.velocity`, with `replace` applied to what text enters each attention as, and to the
    queries, keys and values of either stream.
    """
    network, rows, columns = model.network, x.shape[2] // 2, x.shape[3] // 2
    time = torch.full((len(x),), 1000 * (1 - t))
    told = () if cond.guidance is None else (1000 * cond.guidance,)
    temb = silu(network.time_text_embed(time, *told, cond.pooled))
    tokens = [
        x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
        for i in range(rows)
        for j in range(columns)
    ]
    image = network.x_embedder(torch.stack(tokens, 1))
    words = network.context_embedder(cond.embeds)
    places = [(0, 0, 0)] * words.shape[1]
    places += [(0, i, j) for i in range(rows) for j in range(columns)]
    turns = rotations(torch.tensor(places), network.config.axes_dims_rope)

    double, single = network.transformer_blocks, network.single_transformer_blocks
    for site, block in enumerate(double):
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation(block.norm1, temb, 6)
        c = modulation(block.norm1_context, temb, 6)
        a, b = norm(image) * (1 + scale) + shift, norm(words) * (1 + c[1]) + c[0]
        b = replace(site, "text", "text", b)
        attn = block.attn
        maps = {
            "query": (attn.add_q_proj, attn.to_q),
            "key": (attn.add_k_proj, attn.to_k),
            "value": (attn.add_v_proj, attn.to_v),
        }
        made = {
            kind: (replace(site, kind, "text", of_b(b)), replace(site, kind, "image", of_a(a)))
            for kind, (of_b, of_a) in maps.items()
        }
        norms = {"query": (attn.norm_added_q, attn.norm_q), "key": (attn.norm_added_k, attn.norm_k)}
        out_words, out_image = attention(attn, made, norms, turns)
        image = image + gate * attn.to_out[0](out_image)
        words = words + c[2] * attn.to_add_out(out_words)
        image = image + ff_gate * block.ff(norm(image) * (1 + ff_scale) + ff_shift)
        words = words + c[5] * block.ff_context(norm(words) * (1 + c[4]) + c[3])

    for site, block in enumerate(single, start=len(double)):
        shift, scale, gate = modulation(block.norm, temb, 3)
        a, b = norm(image) * (1 + scale) + shift, norm(words) * (1 + scale) + shift
        # The feed-forward runs beside attention, on what has not been replaced.
        ff_image, ff_words = (gelu(block.proj_mlp(s), approximate="tanh") for s in (a, b))
        b = replace(site, "text", "text", b)
        attn = block.attn
        fused = {"query": attn.to_q, "key": attn.to_k, "value": attn.to_v}
        made = {
            kind: (replace(site, kind, "text", linear(b)), replace(site, kind, "image", linear(a)))
            for kind, linear in fused.items()
        }
        norms = {"query": (attn.norm_q, attn.norm_q), "key": (attn.norm_k, attn.norm_k)}
        out_words, out_image = attention(attn, made, norms, turns)
        image = image + gate * block.proj_out(torch.cat([out_image, ff_image], 2))
        words = words + gate * block.proj_out(torch.cat([out_words, ff_words], 2))

    scale, shift = (part[:, None] for part in network.norm_out.linear(temb).chunk(2, 1))
    u = network.proj_out(norm(image) * (1 + scale) + shift)
    v = torch.empty_like(x)
    for number in range(rows * columns):
        i, j = 2 * (number // columns), 2 * (number % columns)
        v[:, :, i : i + 2, j : j + 2] = -u[:, number].reshape(len(x), -1, 2, 2)
    return v


def modulation(adaln: Any, temb: Tensor, parts: int) -> list[Tensor]:
    return [part[:, None] for part in adaln.linear(temb).chunk(parts, 1)]


def rotations(places: Tensor, dims: tuple[int, ...]) -> Tensor:
    """exp(i p ω) for each token and each pair of features, ω = 10000^(-2j/d) along each axis."""
    angles = [
        places[:, axis, None] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for axis, dim in enumerate(dims)
    ]
    turned = torch.cat(angles, 1)
    return torch.polar(torch.ones_like(turned), turned)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def attention(
    attn: Any,
    made: dict[str, tuple[Tensor, Tensor]],
    norms: dict[str, tuple[Any, Any]],
    turns: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of text and image, from (text, image) features of each kind."""
    joined = {}
    for kind, streams in made.items():
        parts = [heads(features, attn.heads) for features in streams]
        if kind in norms:
            parts = [normalise(part) for normalise, part in zip(norms[kind], parts, strict=True)]
        joined[kind] = torch.cat(parts, 2)
    q, k = turn(joined["query"], turns), turn(joined["key"], turns)
    out = softmax_attention(q, k, joined["value"])
    text = made["value"][0].shape[1]
    return out[:, :text], out[:, text:]
