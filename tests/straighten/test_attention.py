"""Plain attention while a U-Net is trained on the CPU."""

from __future__ import annotations

import copy

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from rectiflow.models.load import load
from rectiflow.straighten.attention import use_plain_attention


def test_the_network_and_its_gradients_are_the_same() -> None:
    fused = load("emoji-sd").network.float().requires_grad_(True)
    fused.set_attn_processor(AttnProcessor2_0())
    plain = copy.deepcopy(fused)
    use_plain_attention(plain)
    assert {type(p) for p in plain.attn_processors.values()} == {AttnProcessor}
    assert {type(p) for p in fused.attn_processors.values()} == {AttnProcessor2_0}
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, fused.config.in_channels, 16, 16, generator=draw)
    text = torch.randn(2, 24, fused.config.cross_attention_dim, generator=draw)
    t = torch.tensor([10, 900])
    seen = []
    for network in (fused, plain):
        out = network(x, t, text, return_dict=False)[0]
        out.square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
        seen.append((out.detach(), gradient))
    for one, other in zip(*seen, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-5


def test_attention_that_was_replaced_stays() -> None:
    class Own(AttnProcessor):
        pass

    network = load("emoji-sd").network
    network.set_attn_processor(Own())
    use_plain_attention(network)
    assert {type(p) for p in network.attn_processors.values()} == {Own}
