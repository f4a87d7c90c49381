"""The codec's recipe: what trains, what stays, and what its loss is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel

from rectiflow.emoji.vae import VaeConfig, VaeTask
from rectiflow.models.load import WEIGHTS


def task(**settings: Any) -> VaeTask:
    start = {"init_from": WEIGHTS / "emoji-vae", "decoder_only": True, "half_size_weight": 0}
    return VaeTask(VaeConfig(**(start | settings)))


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return task().batch([3, 4])


def test_the_decoder_alone_is_trained(batch: dict[str, torch.Tensor]) -> None:
    trained = task(perceptual_weight=1.0)
    trained.network(**batch).sum().backward()
    encoder, decoder = trained.vae.encoder.parameters(), trained.vae.decoder.parameters()
    assert all(p.grad is None for p in encoder)
    assert all(p.grad is not None for p in decoder)
    # The features that judge it are neither trained nor saved with it.
    assert not [name for name in trained.network.state_dict() if "vision" in name]


def test_the_perceptual_term_is_lpips_in_the_features_of_emoji_clip(
    batch: dict[str, torch.Tensor],
) -> None:
    weight = 0.5
    with torch.no_grad():
        found = task(perceptual_weight=weight).network(**batch) - task().network(**batch)

        vae = AutoencoderKL.from_pretrained(WEIGHTS / "emoji-vae", dtype=torch.float32)
        clip = CLIPModel.from_pretrained(WEIGHTS / "emoji-clip", dtype=torch.float32)
        images = batch["images"].contiguous()
        posterior = vae.encode(2 * images - 1).latent_dist
        output = vae.decode(posterior.mean + posterior.std * batch["noise"]).sample / 2 + 0.5

        def layers(pictures: torch.Tensor) -> torch.Tensor:
            # emoji-clip's image processor: mean 0.5, deviation 0.5.
            states = clip.vision_model((pictures - 0.5) / 0.5, output_hidden_states=True)
            unit = torch.nn.functional.normalize
            return torch.stack([unit(s, dim=-1) for s in states.hidden_states[1:]])

        expected = (layers(output) - layers(images)).square().sum(-1).mean((0, 2))
    # Other memory layouts, and LPIPS' 1e-8 inside the root.
    torch.testing.assert_close(found, weight * expected, atol=1e-4, rtol=1e-3)
