"""Qwen-Image's network written out, with places to replace features: an oracle for tests.

No hooks and no processors of diffusers: attention is a softmax over what is not masked, AdaLN a
scale and a shift, a rotary position the product of complex numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from rectiflow.models import Conditioning, QwenImageModel
from tests.steer.reference import heads, norm
from tests.steer.reference_flux import Features, rotations, turn, untouched

__all__ = ["Features", "reference_guided", "reference_velocity", "untouched"]


@torch.no_grad()
def reference_velocity(
    model: QwenImageModel, x: Tensor, t: float, cond: Conditioning, replace: Features = untouched
) -> Tensor:
    """`model.velocity`, with `replace` applied to what text enters each attention as, and to the
    queries, keys and values of either stream.
    """
    network, rows, columns = model.network, x.shape[2] // 2, x.shape[3] // 2
    angles = 1000 * (1 - t) * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([angles.cos(), angles.sin()]).to(x.dtype).expand(len(x), -1)
    embedder = network.time_text_embed.timestep_embedder
    temb = silu(embedder.linear_2(silu(embedder.linear_1(waves))))

    tokens = [
        x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
        for i in range(rows)
        for j in range(columns)
    ]
    image = network.img_in(torch.stack(tokens, 1))
    root = (cond.embeds.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    words = network.txt_in(cond.embeds / root * network.txt_norm.weight)
    # The image's rows and columns are counted from its middle, text goes on from its edge.
    first = max(rows // 2, columns // 2)
    places = [(first + i,) * 3 for i in range(words.shape[1])]
    top, left = rows - rows // 2, columns - columns // 2
    places += [(0, i - top, j - left) for i in range(rows) for j in range(columns)]
    turns = rotations(torch.tensor(places), network.config.axes_dims_rope)
    assert cond.mask is not None
    seen = torch.cat([cond.mask, cond.mask.new_ones(len(x), len(tokens))], 1)

    for site, block in enumerate(network.transformer_blocks):
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts(block.img_mod[1](temb), 6)
        c = parts(block.txt_mod[1](temb), 6)
        a, b = norm(image) * (1 + scale) + shift, norm(words) * (1 + c[1]) + c[0]
        b = replace(site, "text", "text", b)
        attn = block.attn
        maps = {
            "query": (attn.add_q_proj, attn.to_q, attn.norm_added_q, attn.norm_q),
            "key": (attn.add_k_proj, attn.to_k, attn.norm_added_k, attn.norm_k),
            "value": (attn.add_v_proj, attn.to_v, None, None),
        }
        joined = {}
        for kind, (of_b, of_a, norm_b, norm_a) in maps.items():
            text = heads(replace(site, kind, "text", of_b(b)), attn.heads)
            picture = heads(replace(site, kind, "image", of_a(a)), attn.heads)
            if norm_b is not None:
                text, picture = norm_b(text), norm_a(picture)
            joined[kind] = torch.cat([text, picture], 2)
        q, k = turn(joined["query"], turns), turn(joined["key"], turns)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp() * seen[:, None, None]
        out = scores @ joined["value"] / scores.sum(-1, keepdim=True)
        out_words, out_image = out.transpose(1, 2).flatten(2).tensor_split([words.shape[1]], 1)
        image = image + gate * attn.to_out[0](out_image)
        words = words + c[2] * attn.to_add_out(out_words)
        image = image + ff_gate * mlp(block.img_mlp, norm(image) * (1 + ff_scale) + ff_shift)
        words = words + c[5] * mlp(block.txt_mlp, norm(words) * (1 + c[4]) + c[3])

    scale, shift = parts(network.norm_out.linear(temb), 2)
    u = network.proj_out(norm(image) * (1 + scale) + shift)
    v = torch.empty_like(x)
    for number in range(rows * columns):
        i, j = 2 * (number // columns), 2 * (number % columns)
        v[:, :, i : i + 2, j : j + 2] = -u[:, number].reshape(len(x), -1, 2, 2)
    return v


def reference_guided(unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
    """Guidance, then each token, 2 × 2 cells of all channels, at the norm it has in `guided`."""
    result = unguided + scale * (guided - unguided)
    for i in range(0, guided.shape[2], 2):
        for j in range(0, guided.shape[3], 2):
            cells = (..., slice(i, i + 2), slice(j, j + 2))
            norms = [v[cells].flatten(1).norm(dim=1) for v in (guided, result)]
            result[cells] = result[cells] * (norms[0] / norms[1])[:, None, None, None]
    return result


def parts(modulation: Tensor, count: int) -> list[Tensor]:
    return [part[:, None] for part in modulation.chunk(count, 1)]


def mlp(feed_forward: torch.nn.Module, x: Tensor) -> Tensor:
    first, last = feed_forward.net[0].proj, feed_forward.net[2]  # type: ignore[index,union-attr]
    return last(gelu(first(x), approximate="tanh"))  # type: ignore[operator,no-any-return]
