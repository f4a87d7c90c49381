"""SD3's network written out from its paper, with places to replace features: an oracle for tests.

No hooks and no processors of diffusers: attention is a softmax, AdaLN a scale and a shift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rectiflow.models import SD3Model
from rectiflow.models.base import Conditioning

Text = Callable[[Tensor], Tensor]
Projected = Callable[[str, str, Tensor], Tensor]


def reference_velocity(
    model: SD3Model,
    x: Tensor,
    t: float,
    cond: Conditioning,
    text: Text = lambda features: features,
    projected: Projected = lambda kind, stream, features: features,
) -> Tensor:
    """`model.velocity`, with `text` applied to what text enters the joint attention as, and
    `projected` to queries, keys and values, in every block but the last.
    """
    network = model.network
    time = torch.full((len(x),), 1000 * (1 - t))
    temb = torch.nn.functional.silu(network.time_text_embed(time, cond.pooled))
    image, words = network.pos_embed(x), network.context_embedder(cond.embeds)
    last = len(network.transformer_blocks) - 1
    for number, block in enumerate(network.transformer_blocks):
        parts = [part[:, None] for part in block.norm1.linear(temb).chunk(6 + 3 * medium(block), 1)]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts[:6]
        a = norm(image) * (1 + scale) + shift
        if number == last:
            c_scale, c_shift = (p[:, None] for p in block.norm1_context.linear(temb).chunk(2, 1))
            b = norm(words) * (1 + c_scale) + c_shift
            out, _ = joint_attention(block.attn, a, b, lambda kind, stream, features: features)
        else:
            c = [part[:, None] for part in block.norm1_context.linear(temb).chunk(6, 1)]
            b = text(norm(words) * (1 + c[1]) + c[0])
            out, c_out = joint_attention(block.attn, a, b, projected)
            words = words + c[2] * block.attn.to_add_out(c_out)
            words = words + c[5] * block.ff_context(norm(words) * (1 + c[4]) + c[3])
        second = None
        if medium(block):
            second = parts[8] * image_attention(
                block.attn2, norm(image) * (1 + parts[7]) + parts[6]
            )
        image = image + gate * block.attn.to_out[0](out)
        if second is not None:
            image = image + second
        image = image + ff_gate * block.ff(norm(image) * (1 + ff_scale) + ff_shift)
    scale, shift = (part[:, None] for part in network.norm_out.linear(temb).chunk(2, 1))
    pixels = network.proj_out(norm(image) * (1 + scale) + shift)
    h, w = x.shape[2] // 2, x.shape[3] // 2
    pixels = pixels.reshape(len(x), h, w, 2, 2, x.shape[1]).permute(0, 5, 1, 3, 2, 4)
    return -pixels.reshape(x.shape)


def medium(block: Any) -> bool:
    return block.attn2 is not None


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def joint_attention(
    attention: Any, image: Tensor, text: Tensor, projected: Projected
) -> tuple[Tensor, Tensor]:
    streams = {"image": image, "text": text}
    layers = {
        ("query", "image"): (attention.to_q, attention.norm_q),
        ("key", "image"): (attention.to_k, attention.norm_k),
        ("value", "image"): (attention.to_v, None),
        ("query", "text"): (attention.add_q_proj, attention.norm_added_q),
        ("key", "text"): (attention.add_k_proj, attention.norm_added_k),
        ("value", "text"): (attention.add_v_proj, None),
    }
    made = {}
    for (kind, stream), (linear, normalise) in layers.items():
        features = heads(projected(kind, stream, linear(streams[stream])), attention.heads)
        made[kind, stream] = features if normalise is None else normalise(features)
    q, k, v = (
        torch.cat([made[kind, "image"], made[kind, "text"]], 2)
        for kind in ("query", "key", "value")
    )
    out = softmax_attention(q, k, v)
    return out[:, : image.shape[1]], out[:, image.shape[1] :]


def image_attention(attention: Any, x: Tensor) -> Tensor:
    q, k, v = (
        heads(f(x), attention.heads) for f in (attention.to_q, attention.to_k, attention.to_v)
    )
    return attention.to_out[0](softmax_attention(attention.norm_q(q), attention.norm_k(k), v))


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)
