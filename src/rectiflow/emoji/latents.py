"""Latents of the training scenes, encoded once: a flow model sees each of them several times."""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from rectiflow.emoji.vae import scenes
from rectiflow.guarded import read_tensors
from rectiflow.progress import progress
from rectiflow.sealed import load_sealed, save_sealed

CHUNK = 1000


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents as flow models use them: scaled and shifted, the mode of the posterior, float32."""
    with torch.autocast(images.device.type, torch.bfloat16):
        z = vae.encode(2 * images - 1).latent_dist.mode().float()
    latents: Tensor = (z - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


def cached_latents(vae: AutoencoderKL, folder: Path, count: int) -> Tensor:
    """The latents of scene seeds 0 … count − 1, float16 ``[count, C, h, w]``.

    They are kept in `folder` in chunks, each written whole, so that an interrupted run goes on
    where it was, and several processes can share the work; `folder` belongs to one codec.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = progress(range(0, count, CHUNK), desc="encoding scenes")
    return torch.cat([load_chunk(vae, folder, start) for start in starts])[:count]


def load_chunk(vae: AutoencoderKL, folder: Path, start: int) -> Tensor:
    """The latents of scene seeds start … start + CHUNK − 1, encoded if they are not there yet."""
    file = folder / f"{start:07d}.safetensors"
    if not file.exists():
        parts = [encode(vae, scenes(range(i, i + 100))) for i in range(start, start + CHUNK, 100)]
        save_sealed(file, {"latents": torch.cat(parts).half()}, {"first": start})
    return load_sealed(file, earlier=True)[0]["latents"]


def latents_folder(vae: Path, root: Path) -> Path:
    """Where below `root` the latents of the codec in the folder `vae` are kept: by its encoder."""
    weights, _ = read_tensors(vae / "diffusion_pytorch_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(weights):
        if name.startswith("encoder."):
            digest.update(weights[name].numpy().tobytes())
    return root / digest.hexdigest()[:12]


def permuted(place: int, epoch: int, count: int) -> int:
    """The scene at a place of an epoch: an affine permutation of 0 … count − 1."""
    rng = random.Random(epoch)
    offset = rng.randrange(count)
    while math.gcd(multiplier := rng.randrange(1, count), count) != 1:
        pass
    return (place * multiplier + offset) % count
