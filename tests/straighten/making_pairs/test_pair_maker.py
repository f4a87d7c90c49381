"""Making pairs: what they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image, ImageOps
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.models import generate_latents
from rectiflow.models.base import FlowModel
from rectiflow.models.images import to_tensor
from rectiflow.straighten.manifest import COMPLETE, MANIFEST, PROMPTS
from rectiflow.straighten.text_cache import TextCache, remembering_prompts
from tests.straighten.pair_making import (
    BATCH,
    BATCHES,
    LIST,
    NUM,
    SHARD,
    Calls,
    contents,
    make,
    rows,
    stop_after,
)
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model


def test_pairs_are_what_the_teacher_generates(model: FlowModel, whole: Path) -> None:
    """Pair by pair with the noise of its seed, in the same batches: to the last bit of float16."""
    noise = [
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(40 + i)) for i in range(NUM)
    ]
    expected = []
    for shard in range(0, NUM, SHARD):
        stop = min(shard + SHARD, NUM)
        for row in range(shard, stop, BATCH):
            batch = range(row, min(row + BATCH, stop))
            solution = generate_latents(
                model,
                [LIST[i % len(LIST)] for i in batch],
                torch.stack([noise[i] for i in batch]),
                num_inference_steps=2,
                guidance_scale=2.5,
                solver="euler",
            )
            expected.append(solution.x.half())
    x_1 = rows(whole, "x_1")
    assert x_1.dtype == torch.float16 and torch.equal(x_1, torch.cat(expected))
    cost = (x_1.double() - torch.stack(noise).double()).square().mean((1, 2, 3))
    assert torch.allclose(rows(whole, "cost").double(), cost, rtol=1e-6)
    for number, shard in enumerate(range(0, NUM, SHARD)):
        sidecar = json.loads((whole / f"shard-{number:06d}.json").read_text())
        x_0 = torch.stack(noise[shard : shard + SHARD]).numpy()
        assert sidecar["x_0_sha256"] == hashlib.sha256(x_0.tobytes()).hexdigest()


def test_what_a_finished_store_says(model: FlowModel, whole: Path) -> None:
    files = contents(whole)
    shards = [f"shard-{i:06d}" for i in range(4)]
    expected = {f"{shard}.{kind}" for shard in shards for kind in ("safetensors", "json")}
    assert set(files) == expected | {MANIFEST, PROMPTS, COMPLETE}
    manifest = json.loads(files[MANIFEST])
    said = {name: manifest[name] for name in ("weight_hash", "dtype", "num_prompts", "base_seed")}
    assert said == {
        "weight_hash": model.weight_hash,
        "dtype": "float32",
        "num_prompts": 5,
        "base_seed": 40,
    }
    complete = json.loads(files[COMPLETE])
    assert complete["num"] == NUM and complete["shards"] == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in sorted(files.items())
        if name.endswith(".safetensors")
    }


def test_what_guidance_pushes_away_from(model: FlowModel, tmp_path: Path) -> None:
    make(model, tmp_path / "store", num=3, negative_prompt="a dog")
    noise = [
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(40 + i)) for i in range(3)
    ]
    x = [
        generate_latents(
            model,
            LIST[:3],
            torch.stack(noise),
            negative_prompt=negative,
            num_inference_steps=2,
            guidance_scale=2.5,
            solver="euler",
        ).x.half()
        for negative in ("a dog", None)
    ]
    stored = rows(tmp_path / "store", "x_1")
    assert torch.equal(stored, x[0]) and not torch.equal(stored, x[1])


def test_half_precision_teachers(tmp_path: Path) -> None:
    """The network in its dtype, the states in float32: what `generate_latents` does."""
    model = tiny_model(dtype=torch.bfloat16)
    make(model, tmp_path / "store", num=3)
    noise = [
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(40 + i)) for i in range(3)
    ]
    x = generate_latents(
        model,
        LIST[:3],
        torch.stack(noise),
        num_inference_steps=2,
        guidance_scale=2.5,
        solver="euler",
    ).x
    assert x.dtype == torch.float32
    assert torch.equal(rows(tmp_path / "store", "x_1"), x.half())
    assert json.loads((tmp_path / "store" / MANIFEST).read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("solver", ["dpmpp", "ddim"])
def test_diffusion_teachers_by_the_schedulers_of_diffusers(tmp_path: Path, solver: str) -> None:
    """Against the pipeline of diffusers itself, given the same noise."""
    model = tiny_sd_model()
    make(model, tmp_path / "store", solver=solver, num=4, batch_size=2, num_inference_steps=4)
    noise = [
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(40 + i)) for i in range(4)
    ]
    pipeline = type(model.pipeline)(**model.pipeline.components)
    made = DPMSolverMultistepScheduler if solver == "dpmpp" else DDIMScheduler
    pipeline.scheduler = made.from_config(model.pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = [
        pipeline(
            LIST[i : i + 2],
            latents=torch.stack(noise[i : i + 2]),
            num_inference_steps=4,
            guidance_scale=2.5,
            output_type="latent",
        ).images
        for i in (0, 2)
    ]
    x_1 = rows(tmp_path / "store", "x_1").float()
    assert torch.allclose(x_1, torch.cat(expected), rtol=2e-3, atol=2e-3)


def test_text_is_embedded_once_and_the_network_runs_no_more_than_it_must(
    model: FlowModel, tmp_path: Path
) -> None:
    encoders = {"one": model.pipeline.text_encoder, "two": model.pipeline.text_encoder_2}
    with Calls(network=model.network, **encoders) as calls:
        make(model, tmp_path / "store")
    # Four distinct prompts and the empty one; two steps of each batch, and one row's trial.
    assert calls.count == {"one": 5, "two": 5, "network": 2 * BATCHES + 1}
    assert calls.rows["network"] == 2 * 2 * NUM + 2
    assert "encode_prompt" not in vars(model)
    with Calls(network=model.network, **encoders) as calls:
        done = make(model, tmp_path / "store")
    assert not calls.count and done.complete and done.made == 0


def test_remembered_prompts_are_bounded_and_the_same(model: FlowModel) -> None:
    fresh = model.encode_prompt(LIST)
    one = fresh.embeds[0].nbytes + fresh.pooled[0].nbytes  # type: ignore[index]
    with Calls(text=model.pipeline.text_encoder) as calls:
        cache = TextCache(model, budget=2 * one)
        for _ in range(3):
            found = cache.encode_prompt(LIST)
            assert torch.equal(found.embeds, fresh.embeds)
            assert found.pooled is not None and torch.equal(found.pooled, fresh.pooled)  # type: ignore[arg-type]
            assert cache.bytes <= 2 * one
        # The last two are remembered, the other two are not.
        assert calls.count["text"] == 4 + 2 + 2
        cache = TextCache(model, budget=2 * one)
        for prompt in ("a", "b", "a", "c", "a"):  # b is what was asked for longest ago
            cache.encode_prompt(prompt)
        assert calls.count["text"] == 8 + 3
    with remembering_prompts(model), pytest.raises(ZeroDivisionError):
        assert "encode_prompt" in vars(model)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), remembering_prompts(model):
        raise ZeroDivisionError
    assert "encode_prompt" not in vars(model)


def test_a_shards_bytes_are_its_latents(model: FlowModel, tmp_path: Path) -> None:
    """At the size of Stable Diffusion's latents and shards, sidecar and all, within 2 %."""
    done = make(
        model, tmp_path / "store", num=64, shard_size=64, batch_size=64, height=96, width=96
    )
    assert done.bytes == sum(
        len(data) for name, data in contents(done.uri).items() if name.startswith("shard-")
    )
    latents = 2 * 4 * 24 * 24
    assert latents <= done.bytes / 64 <= 1.02 * latents


# Real images with their inversions.


def test_inverted_pairs_of_a_diffusion_model(pictures: list[Path], tmp_path: Path) -> None:
    """Its flow begins at t_min, from a multiple of the noise; it is that noise which is stored."""
    model = tiny_sd_model()
    # What a random network adds to the field is wild, and would need many more steps.
    model.network.conv_out.weight.mul_(0.1)
    settings = {"num_inference_steps": 12, "guidance_scale": 1.0, "solver": "rk4"}
    two = {"images": pictures[:2], "prompts": LIST[:2], "num": None}
    make(model, tmp_path / "store", **two, **settings)
    x_0, x_1 = rows(tmp_path / "store", "x_0").float(), rows(tmp_path / "store", "x_1").float()

    def error(noise: Tensor) -> float:
        end = generate_latents(model, LIST[:2], noise, **settings).x
        return float((end - x_1).norm() / (x_1 - x_0).norm())

    assert error(x_0) < 0.02 < 0.05 < error(model.initial_state(x_0))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        small = rng.integers(0, 256, (4, 5 + i, 3), np.uint8)
        Image.fromarray(small).resize((40 + 8 * i, 48)).save(file)
    return files


def test_inverted_pairs(model: FlowModel, pictures: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    settings = {"num": None, "solver": "rk4", "num_inference_steps": 8, "guidance_scale": 1.0}
    done = make(model, store, images=pictures, shard_size=3, batch_size=2, **settings)
    assert done.complete and done.manifest.kind == "inverted" and done.manifest.num == 5
    x_0, x_1 = rows(store, "x_0"), rows(store, "x_1")
    fitted = [ImageOps.fit(Image.open(f), (32, 32), Image.Resampling.LANCZOS) for f in pictures]
    encoded = model.encode_image(torch.cat([to_tensor(picture) for picture in fitted]))
    assert torch.allclose(x_1.float(), encoded, atol=2e-3)
    # The flow from x_0 leads back to the image.
    back = generate_latents(
        model, LIST, x_0.float(), num_inference_steps=8, guidance_scale=1.0, solver="rk4"
    ).x
    distance = (x_1.float() - x_0.float()).square().mean().sqrt()
    assert (back - x_1.float()).square().mean().sqrt() < 0.02 * distance
    sidecar = json.loads((store / "shard-000000.json").read_text())
    stored = x_0[:3].float().numpy().tobytes()
    assert sidecar["x_0_sha256"] == hashlib.sha256(stored).hexdigest()
    # Interrupted, and by two writers: the same.
    again = tmp_path / "again"
    with stop_after(model, 40), pytest.raises(KeyboardInterrupt):
        make(model, again, images=pictures, shard_size=3, batch_size=2, keep_seconds=0, **settings)
    for worker in (1, 0):
        done = make(
            model,
            again,
            images=[str(file) for file in pictures],
            shard_size=3,
            batch_size=2,
            worker=worker,
            num_workers=2,
            **settings,
        )
    assert done.complete and contents(again) == contents(store)
    # Another picture under the same name is another store.
    Image.new("RGB", (40, 40)).save(pictures[2])
    with pytest.raises(InputError, match="with images_sha256"):
        make(model, store, images=pictures, shard_size=3, batch_size=2, **settings)
    with pytest.raises(InputError, match="num is 6, and there are 5 images"):
        make(model, tmp_path / "new", images=pictures, **settings | {"num": 6})
