"""How good the embedded models are, on scenes that neither training nor tuning has seen.

The codec by PSNR, the CLIP by retrieval, and the text-to-image model by the judge, who sees its
pictures only and knows nothing that was learned.
"""

from __future__ import annotations

import datetime
import math
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from rectiflow._version import __version__
from rectiflow.emoji.caption import caption
from rectiflow.emoji.render import render
from rectiflow.emoji.scene import Scene, sample
from rectiflow.emoji.vae import HELD_OUT, scenes
from rectiflow.errors import InputError
from rectiflow.evaluate.judge import Verdict, agrees, judge
from rectiflow.evaluate.templates import SIZE
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import generate
from rectiflow.models.inspection import inspect_folder
from rectiflow.models.libraries import quiet_libraries
from rectiflow.models.load import WEIGHTS, load
from rectiflow.progress import progress
from rectiflow.report.sheet import contact_sheet

CAPTIONS = 300
CODEC_SCENES = 512
GROUPS, GROUP = 30, 100
"""CLIP tells apart the captions of GROUP scenes at a time."""
BATCH = 50
QUESTIONS = ("emoji", "background", "count")


@dataclass(frozen=True)
class Clip:
    """A CLIP with what it needs to read captions and pictures, as stock transformers load it."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    processor: CLIPImageProcessorPil


def load_clip(folder: Path) -> Clip:
    """The CLIP of a folder; InputError if there is none."""
    _check_folder(folder)
    with quiet_libraries():
        return Clip(
            CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(),
            CLIPTokenizer.from_pretrained(folder),
            CLIPImageProcessorPil.from_pretrained(folder),
        )


def load_codec(folder: Path) -> AutoencoderKL:
    """The codec of a folder, in float32; InputError if there is none."""
    _check_folder(folder)
    codec: AutoencoderKL = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    return codec.eval()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model: train it with rectiflow train {folder.name}")
    inspect_folder(folder)


@torch.inference_mode()
def codec_psnr(codec: AutoencoderKL, seeds: Sequence[int]) -> list[float]:
    """PSNR of each scene's picture through the codec (mode of the posterior), dB.

    Pixels are in [0, 1], the decoded ones clamped to it.
    """
    figures: list[float] = []
    for start in _progress(range(0, len(seeds), 64), "codec"):
        images = scenes(seeds[start : start + 64]).to(codec.device)
        latents = codec.encode(2 * images - 1).latent_dist.mode()
        decoded = (codec.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        errors = (decoded - images).cpu().double().square().mean(dim=(1, 2, 3))
        figures += (-10 * torch.log10(errors.clamp(min=1e-12))).tolist()
    return figures


@torch.inference_mode()
def retrieval(clip: Clip, first_seed: int, groups: int, size: int = GROUP) -> list[float]:
    """Top-1 retrieval of the caption from the picture, a share per group.

    Args:
        clip: the model.
        first_seed: scenes are those of the seeds from here on.
        groups: how many groups.
        size: scenes in a group, whose captions all differ.
    """
    shares: list[float] = []
    seed = first_seed
    for _ in _progress(range(groups), "clip"):
        group: dict[str, Scene] = {}
        while len(group) < size:
            scene = sample(seed)
            group.setdefault(caption(scene), scene)
            seed += 1
        logits = _logits(clip, [render(scene, SIZE) for scene in group.values()], list(group))
        right = logits.argmax(dim=1).cpu() == torch.arange(size)
        shares.append(float(right.double().mean()))
    return shares


def _logits(clip: Clip, pictures: list[Image.Image], captions: list[str]) -> Tensor:
    pixels = clip.processor(images=pictures, return_tensors="pt")
    tokens = clip.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    output = clip.model(
        pixel_values=pixels["pixel_values"].to(clip.model.device),
        input_ids=tokens["input_ids"].to(clip.model.device),
    )
    logits: Tensor = output.logits_per_image
    return logits


def draw_captions(
    model: FlowModel,
    seeds: Sequence[int],
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = BATCH,
) -> list[Image.Image]:
    """What a model makes of the captions of scenes; the noise is drawn from the same seeds."""
    pictures: list[Image.Image] = []
    for start in _progress(range(0, len(seeds), batch_size), "generate"):
        batch = list(seeds[start : start + batch_size])
        pictures += generate(
            model,
            [caption(sample(seed)) for seed in batch],
            seed=batch,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=SIZE,
            width=SIZE,
        )
    return pictures


def judge_all(pictures: Sequence[Image.Image], label: str = "judge") -> list[Verdict]:
    """The verdict on each picture."""
    return [judge(picture) for picture in _progress(pictures, label)]


def agreement(verdicts: Sequence[Verdict], expected: Sequence[Scene]) -> dict[str, Any]:
    """How often verdicts agree with scenes: shares, 95 % intervals, and by number of items."""
    answers = [agrees(v, scene) for v, scene in zip(verdicts, expected, strict=True)]
    counts = Counter(len(scene.items) for scene in expected)
    total = {question: sum(answer[question] for answer in answers) for question in QUESTIONS}
    by_count = {
        str(count): {
            "n": n,
            **{
                question: sum(
                    answer[question]
                    for answer, scene in zip(answers, expected, strict=True)
                    if len(scene.items) == count
                )
                / n
                for question in QUESTIONS
            },
        }
        for count, n in sorted(counts.items())
    }
    return {
        "n": len(answers),
        **{question: right / len(answers) for question, right in total.items()},
        "all": sum(all(answer.values()) for answer in answers) / len(answers),
        "interval": {q: share_interval(right, len(answers)) for q, right in total.items()},
        "by_count": by_count,
    }


def evaluate_emoji_models(
    model: FlowModel | None = None,
    codec: AutoencoderKL | None = None,
    clip: Clip | None = None,
    *,
    limit: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = BATCH,
    first_seed: int = HELD_OUT,
) -> tuple[dict[str, Any], Image.Image]:
    """Measure the three embedded models.

    Args:
        model: text to image; `emoji-sd3` if None.
        codec: `emoji-vae` if None.
        clip: `emoji-clip` if None.
        limit: captions to generate, 300 if None; the other sets shrink in proportion.
        num_inference_steps: of the model; its stated number if None.
        guidance_scale: the model's stated one if None.
        batch_size: pictures that go through the model together.
        first_seed: scenes are those of the seeds from here on; the reported ones if not given.

    Returns:
        The figures, ``{"vae_psnr", "clip_top1", "judge", "samples", "details"}``, with the number
        of generated pictures as ``samples``; and a sheet of the first of those, each marked by
        what the judge says.

    Raises:
        InputError: an embedded model is not there, or the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} leaves nothing to evaluate; give 1 or more")
    model = model or load("emoji-sd3")
    codec = codec or load_codec(WEIGHTS / "emoji-vae").to(model.device)
    clip = clip or load_clip(WEIGHTS / "emoji-clip")
    number = limit or CAPTIONS
    steps = num_inference_steps or model.default_num_inference_steps
    share = number / CAPTIONS
    seeds = range(first_seed, first_seed + number)
    expected = [sample(seed) for seed in seeds]
    psnr = codec_psnr(codec, range(first_seed, first_seed + math.ceil(CODEC_SCENES * share)))
    top1 = retrieval(clip, first_seed, math.ceil(GROUPS * share))
    pictures = draw_captions(
        model,
        seeds,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    verdicts = judge_all(pictures)
    judged = agreement(verdicts, expected)
    true = agreement(judge_all([render(s, SIZE) for s in expected], "true renders"), expected)
    guidance = model.default_guidance_scale if guidance_scale is None else guidance_scale
    figures = {
        "vae_psnr": float(np.mean(psnr)),
        "clip_top1": float(np.mean(top1)),
        "judge": {question: judged[question] for question in QUESTIONS},
        "samples": len(pictures),
        "details": {
            "vae_psnr": {"n": len(psnr), "interval": mean_interval(psnr)},
            "clip_top1": {
                "groups": len(top1),
                "captions": GROUP,
                "interval": share_interval(round(sum(top1) * GROUP), len(top1) * GROUP),
            },
            "judge": judged,
            "judge_on_true_renders": true,
            "model": model.name,
            "weight_hash": model.weight_hash,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "nfe": steps * (2 if guidance > 1 else 1),
            "seeds": [first_seed, seeds[-1]],
            **_circumstances(model.device),
        },
    }
    return figures, _sheet(pictures, verdicts, expected)


def share_interval(right: int, n: int) -> list[float]:
    """Wilson's 95 % interval of a share (Wilson, JASA 22, 1927).

    Example:
        >>> [round(end, 3) for end in share_interval(270, 300)]
        [0.861, 0.929]
    """
    z = 1.96
    middle = (right + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(right * (n - right) / n + z**2 / 4)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def mean_interval(values: Sequence[float]) -> list[float]:
    """The 95 % interval of a mean, by the normal distribution; a point for a single value."""
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return [float(np.mean(values)) - half, float(np.mean(values)) + half]


def _circumstances(device: torch.device) -> dict[str, Any]:
    # Not every kind of accelerator tells its name.
    name = getattr(torch.get_device_module(device), "get_device_name", lambda _: platform.machine())
    return {
        "device": f"{device.type} ({name(device)})",
        "threads": torch.get_num_threads(),
        "versions": {"rectiflow": __version__, "torch": torch.__version__},
        "date": datetime.date.today().isoformat(),
    }


def _sheet(
    pictures: Sequence[Image.Image], verdicts: Sequence[Verdict], expected: Sequence[Scene]
) -> Image.Image:
    marks = [
        ("= " if all(agrees(verdict, scene).values()) else "x ") + caption(scene)
        for verdict, scene in zip(verdicts, expected, strict=True)
    ]
    shown = [np.asarray(picture) / 255 for picture in pictures[:64]]
    return contact_sheet(shown, columns=8, scale=2, captions=marks[:64])


def _progress(items: Any, label: str) -> Iterable[Any]:
    # On stderr.
    bar: Iterable[Any] = progress(items, desc=label, leave=False)
    return bar
