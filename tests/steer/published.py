"""Networks as official code calls them, for the methods' equations written out in tests.

In diffusers' signs: σ = 1 at noise, and the velocity u = noise − data. Nothing of rectiflow's is
used but the tiny pipelines: text is embedded, latents are packed and grids are made here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.tiny import CLIP_LENGTH, T5_LENGTH, tiny_sd3
from tests.tiny_flux import DYNAMIC, tiny_flux

SHIFT = 3.0
Text = tuple[Tensor, Tensor]
Values = dict[nn.Module, Tensor]


class Net:
    """A network, called under a text with its guidance."""

    embedded: bool
    """Whether guidance is an input of the network, and not against the empty prompt."""
    empty: Text

    def u(
        self,
        x: Tensor,
        sigma: float,
        text: Text,
        guidance: float = 1.0,
        values: Values | None = None,
    ) -> Tensor:
        """With values in the place of the prompt's own."""
        with replaced(values or {}):
            prompted = self.raw(x, sigma, text, guidance)
        if self.embedded or guidance == 1:
            return prompted
        empty = self.raw(x, sigma, self.empty, guidance)
        return empty + guidance * (prompted - empty)


class SD3(Net):
    """Classifier-free guidance against the empty prompt; latents as they are."""

    family, embedded = "sd3", False
    segments = (CLIP_LENGTH, T5_LENGTH)

    def __init__(self, **kind: Any) -> None:
        self.pipe = tiny_sd3(t5=True, **kind)
        self.blocks = list(self.pipe.transformer.transformer_blocks)
        self.empty = self.text("")

    @functools.cache  # noqa: B019 — as long as the network
    @torch.no_grad()
    def text(self, prompt: str) -> Text:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
        return embeds, pooled

    def raw(self, x: Tensor, sigma: float, text: Text, guidance: float) -> Tensor:
        embeds, pooled = text
        return self.pipe.transformer(
            hidden_states=x,
            timestep=torch.tensor([1000 * sigma]),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def shifted(self, steps: int) -> list[float]:
        """σ spaced evenly, then shifted once."""
        return told([shift(1 - i / steps, SHIFT) for i in range(steps)])

    def stock(self, steps: int) -> list[float]:
        """Without explicit sigmas: spaced evenly to a σ that is shifted already, shifted again."""
        last = shift(1 / 1000, SHIFT)
        even = [1 - (1 - last) * i / (steps - 1) for i in range(steps)]
        return told([shift(sigma, SHIFT) for sigma in even])

    def value_layers(self, first: float, last_block: bool = False) -> list[nn.Module]:
        """What makes values, behind a share of the blocks whose text goes on, and the last one."""
        goes_on = [block for block in self.blocks if not block.context_pre_only]
        chosen = goes_on[int(first * len(goes_on) + 1e-9) :]
        chosen += self.blocks[len(goes_on) :] if last_block else []
        return [layer for block in chosen for layer in (block.attn.to_v, block.attn.add_v_proj)]


class Flux(Net):
    """Guidance is an input; latents are packed into tokens of 2 × 2 cells. 1 double and 2 single
    blocks, so that shares of FLUX's 19 and 38 fall between blocks here too.
    """

    family, embedded = "flux", True

    def __init__(self) -> None:
        self.pipe = tiny_flux(double=1, single=2)
        self.empty = self.text("")

    @functools.cache  # noqa: B019 — as long as the network
    @torch.no_grad()
    def text(self, prompt: str) -> Text:
        embeds, pooled, _ = self.pipe.encode_prompt(prompt, None, max_sequence_length=T5_LENGTH)
        return embeds, pooled

    def raw(self, x: Tensor, sigma: float, text: Text, guidance: float) -> Tensor:
        embeds, pooled = text
        side = x.shape[-1] // 2
        places = [(0.0, i, j) for i in range(x.shape[-2] // 2) for j in range(side)]
        out = self.pipe.transformer(
            hidden_states=packed(x),
            timestep=torch.tensor([sigma]),
            guidance=torch.tensor([guidance]),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            txt_ids=torch.zeros(embeds.shape[1], 3),
            img_ids=torch.tensor(places),
            return_dict=False,
        )[0]
        return unpacked(out, side)

    def factor(self) -> float:
        """exp(μ), μ on a line in the number of tokens: 16 here."""
        share = (16 - DYNAMIC["base_image_seq_len"]) / (
            DYNAMIC["max_image_seq_len"] - DYNAMIC["base_image_seq_len"]
        )
        low, high = DYNAMIC["base_shift"], DYNAMIC["max_shift"]
        return math.exp(low + share * (high - low))

    def shifted(self, steps: int) -> list[float]:
        """σ from 1 to 1/N, shifted, and 0: what the pipeline asks of its scheduler."""
        return told([shift(1 - i / steps, self.factor()) for i in range(steps)])

    def stock(self, steps: int) -> list[float]:
        """Without explicit sigmas: σ from 1 to 1/1000, shifted."""
        even = [1 - (1 - 1 / 1000) * i / (steps - 1) for i in range(steps)]
        return told([shift(sigma, self.factor()) for sigma in even])

    def value_layers(self, first: float, last_block: bool = False) -> list[nn.Module]:
        network = self.pipe.transformer
        layers = [
            *((block.attn.to_v, block.attn.add_v_proj) for block in network.transformer_blocks),
            *((block.attn.to_v,) for block in network.single_transformer_blocks),
        ]
        return [layer for own in layers[int(first * len(layers) + 1e-9) :] for layer in own]


def shift(sigma: float, by: float) -> float:
    return by * sigma / (1 + (by - 1) * sigma)


def told(sigmas: Sequence[float]) -> list[float]:
    """As float32 has it: a network's embedding of 1000 σ sees the last bit."""
    return [1 - float(np.float32(1 - sigma)) for sigma in [*sigmas, 0.0]]


def packed(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, h * w // 4, 4 * c)


def unpacked(tokens: Tensor, side: int) -> Tensor:
    b, n, c = tokens.shape
    x = tokens.view(b, n // side, side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 4, 2 * n // side, 2 * side)


def latents(net: Net, image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = net.pipe.vae
    return (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * (
        vae.config.scaling_factor
    )


def noise(seed: int, draws: int = 1) -> Tensor:
    """Draws one after the other, `[draws, 1, 4, 8, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(1, 4, 8, 8, generator=generator) for _ in range(draws)])


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of any of the results."""
    errors = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return float(errors.max())


@contextmanager
def seen(layers: Sequence[nn.Module]) -> Iterator[Values]:
    """What layers return while the block is run, of the last call of each."""
    values: Values = {}

    def keep(layer: nn.Module, args: Any, output: Tensor) -> None:
        values[layer] = output

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(values: Values) -> Iterator[None]:
    """Layers return these instead."""
    handles = [
        layer.register_forward_hook(lambda *_, value=value: value)
        for layer, value in values.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
