from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rectiflow.emoji.clip import ClipConfig, ClipTask
from rectiflow.emoji.render import render
from rectiflow.emoji.scene import sample
from rectiflow.emoji.vae import VaeConfig, build_vae, scenes
from rectiflow.errors import InputError
from rectiflow.evaluate.emoji_models import (
    Clip,
    agreement,
    codec_psnr,
    draw_captions,
    evaluate_emoji_models,
    judge_all,
    load_clip,
    load_codec,
    mean_interval,
    retrieval,
    share_interval,
)
from tests.tiny import tiny_model

SEEDS = range(1_000_000, 1_000_004)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    folder = tmp_path_factory.mktemp("clip")
    config = ClipConfig(text_width=64, text_layers=1, vision_width=64, vision_layers=1)
    ClipTask(config).export(folder)
    return load_clip(folder)


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    build_vae(VaeConfig(block_out_channels=(8, 8, 16))).half().save_pretrained(folder)
    return folder


def test_codec_psnr_is_that_of_each_picture(codec_folder: Path) -> None:
    codec = load_codec(codec_folder)
    assert codec.dtype == torch.float32
    images = scenes(SEEDS)
    with torch.no_grad():
        latents = codec.encode(2 * images - 1).latent_dist.mean
        decoded = (codec.decode(latents).sample * 0.5 + 0.5).clamp(0, 1)
    errors = [float((a - b).square().mean()) for a, b in zip(images, decoded, strict=True)]
    expected = [-10 * math.log10(error) for error in errors]
    np.testing.assert_allclose(codec_psnr(codec, SEEDS), expected, rtol=1e-4)


def test_an_untrained_clip_retrieves_at_chance(clip: Clip) -> None:
    shares = retrieval(clip, 1_000_000, groups=3, size=20)
    assert len(shares) == 3
    assert all(0 <= share <= 0.4 for share in shares)


def test_true_renders_agree_and_others_do_not() -> None:
    expected = [sample(seed) for seed in SEEDS]
    verdicts = judge_all([render(scene) for scene in expected])
    right = agreement(verdicts, expected)
    assert (right["n"], right["emoji"], right["background"], right["count"]) == (4, 1, 1, 1)
    assert sum(part["n"] for part in right["by_count"].values()) == 4
    wrong = agreement(verdicts[1:] + verdicts[:1], expected)
    assert wrong["emoji"] < 0.5 and wrong["all"] < 0.5


@pytest.mark.filterwarnings("ignore:the prompt")  # the tiny tokenizer does not know our words
def test_a_picture_depends_on_its_seed_and_not_on_its_batch() -> None:
    model = tiny_model()
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    together = draw_captions(model, SEEDS, batch_size=4, **options)
    apart = draw_captions(model, SEEDS[1:2], batch_size=1, **options)
    difference = np.asarray(together[1]).astype(int) - np.asarray(apart[0])
    assert together[1].size == (64, 64) and np.abs(difference).max() <= 1


@pytest.mark.filterwarnings("ignore:the prompt")
def test_the_figures_are_complete_and_are_json(clip: Clip, codec_folder: Path) -> None:
    figures, sheet = evaluate_emoji_models(
        tiny_model(),
        load_codec(codec_folder),
        clip,
        limit=2,
        num_inference_steps=2,
        guidance_scale=2.0,
        first_seed=1_000_000,
    )
    assert set(figures) == {"vae_psnr", "clip_top1", "judge", "samples", "details"}
    assert set(figures["judge"]) == {"emoji", "background", "count"}
    assert figures["samples"] == 2
    details = figures["details"]
    assert (details["num_inference_steps"], details["guidance_scale"], details["nfe"]) == (2, 2, 4)
    assert details["seeds"] == [1_000_000, 1_000_001]
    assert details["judge_on_true_renders"]["emoji"] == 1
    low, high = details["vae_psnr"]["interval"]
    assert low <= figures["vae_psnr"] <= high
    assert json.loads(json.dumps(figures)) == figures
    assert sheet.width >= 2 * 64


def test_intervals() -> None:
    low, high = share_interval(0, 300)
    assert low == pytest.approx(0, abs=1e-12) and 0.01 < high < 0.02
    assert share_interval(300, 300)[1] == pytest.approx(1)
    assert mean_interval([3.0]) == [3, 3]
    assert mean_interval([1.0, 3.0]) == pytest.approx([2 - 1.96, 2 + 1.96])


def test_missing_models_and_empty_limits_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rectiflow train emoji-vae"):
        load_codec(tmp_path / "emoji-vae")
    with pytest.raises(InputError, match="rectiflow train emoji-clip"):
        load_clip(tmp_path / "emoji-clip")
    with pytest.raises(InputError, match="limit of 0"):
        evaluate_emoji_models(limit=0)
