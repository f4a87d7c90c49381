"""Small stores of pairs of random latents, written file by file as `make_pairs` leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rectiflow.straighten.folder import Folder, dump_json
from rectiflow.straighten.manifest import (
    COMPLETE,
    MANIFEST,
    PROMPTS,
    Manifest,
    hash_prompts,
    pack_prompts,
    shard_name,
)
from rectiflow.straighten.shard import shard_of, write_shard

PROMPT_LIST = ("a red apple", "two cats", "ein Bär über Bäumen", "a dog on the left")
SHAPE = (4, 6, 8)


def latents(index: int, shape: Sequence[int] = SHAPE) -> Tensor:
    """x_1 of a pair as it is stored, float32: what float16 can hold, and nothing like its x_0."""
    generator = torch.Generator().manual_seed(10_000 + index)
    scale = 0.5 + (index * 7919 % 101) / 50  # so that costs differ widely
    return (scale * torch.randn(tuple(shape), generator=generator)).half().float()


def noise(seed: int, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def inverted_noise(index: int, shape: Sequence[int] = SHAPE) -> Tensor:
    """x_0 of an inverted pair as it is stored."""
    return noise(77_000 + index, shape).half().float()


def manifest_of(**changes: object) -> Manifest:
    prompts = changes.pop("prompts", PROMPT_LIST)
    fields = {
        "kind": "generated",
        "model": "tiny",
        "weight_hash": "0" * 64,
        "family": "sd3",
        "solver": "euler",
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "height": 24,
        "width": 32,
        "latent_shape": SHAPE,
        "dtype": "float32",
        "device": "cpu",
        "torch": torch.__version__,
        "diffusers": "0.42",
        "threads": 1,
        "base_seed": 100,
        "num": 23,
        "shard_size": 5,
        "batch_size": 2,
        "prompts_sha256": hash_prompts(prompts),  # type: ignore[arg-type]
        "num_prompts": len(prompts),  # type: ignore[arg-type]
    }
    return Manifest.model_validate(fields | changes)


def make_store(
    uri: str | Path,
    *,
    prompts: Sequence[str] = PROMPT_LIST,
    shards: Sequence[int] | None = None,
    x_1: dict[int, Tensor] | None = None,
    **changes: object,
) -> Manifest:
    """Write a store; complete, unless only some `shards` are asked for.

    Args:
        uri: Where.
        prompts: Of the pairs, in turn.
        shards: Which to write; all if None.
        x_1: Latents of some pairs, instead of `latents(index)`.
        **changes: Other fields of the manifest.
    """
    manifest = manifest_of(prompts=prompts, **changes)
    folder = Folder(uri)
    folder.check_writable()
    folder.write(MANIFEST, manifest.to_bytes())
    folder.write(PROMPTS, pack_prompts(prompts))
    written = {}
    shape, inverted = manifest.latent_shape, manifest.kind == "inverted"
    for number in range(manifest.num_shards) if shards is None else shards:
        indices = manifest.shard_range(number)
        ends = [(x_1 or {}).get(i, latents(i, shape)) for i in indices]
        starts = [
            inverted_noise(i, shape) if inverted else noise(manifest.seed(i), shape)
            for i in indices
        ]
        x_0 = torch.stack(starts)
        shard = shard_of(x_0, torch.stack(ends), keep_x_0=inverted)
        written[shard_name(number)] = write_shard(folder, number, shard, indices.start, x_0).sha256
    if shards is None:
        folder.write(COMPLETE, dump_json({"num": manifest.num, "shards": written}))
    return manifest
