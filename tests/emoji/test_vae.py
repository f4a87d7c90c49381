"""The codec's recipe: what trains, what stays, and what its loss is made of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel

from rectiflow.emoji.vae import VaeConfig, VaeTask
from rectiflow.models.load import WEIGHTS
from rectiflow.straighten.trainer import Trainer


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


def test_a_run_taken_up_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """The codec is channels_last, which a checkpoint does not keep, and a fused optimiser takes
    momenta as they lie: in another order, each went to another weight.
    """
    settings: dict[str, Any] = {"block_out_channels": (8, 16), "batch_size": 2, "steps": 6}
    settings |= {"decay_steps": 0, "warmup_steps": 1, "save_every": 3, "report_to": ()}
    config = VaeConfig(**settings, keep_last=9)
    unbroken = Trainer(VaeTask(config), config, tmp_path / "unbroken")
    unbroken.train()
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoint-6")  # killed after the third step
    broken = Trainer(VaeTask(config), config, tmp_path / "broken")
    assert broken.resume() and broken.step == 3
    for parameter, state in broken.learner.optimizers[0].state.items():
        assert state["exp_avg"].stride() == parameter.stride()
    broken.train()
    pairs = zip(unbroken.ema.shadow_params, broken.ema.shadow_params, strict=True)
    for one, other in pairs:
        # Loaded weights may lie where other kernels take them; wrong momenta gave 7e-3.
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
