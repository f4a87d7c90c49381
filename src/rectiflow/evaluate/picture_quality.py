"""How good a model's pictures of captions are: as a pile, one by one, and beside the teacher's.

All models are compared on the same scenes and the same noise: picture i belongs to the caption of
the scene of seed i and was drawn from noise of seed i, so figures of two models make pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rectiflow.emoji.caption import caption
from rectiflow.emoji.render import render_array
from rectiflow.emoji.scene import sample
from rectiflow.errors import InputError
from rectiflow.evaluate.clip_features import (
    BATCH,
    Pictures,
    as_array,
    clip_scores,
    image_features,
)
from rectiflow.evaluate.emoji_models import QUESTIONS, Clip, agreement, judge_all
from rectiflow.evaluate.flow_quality import Column, described
from rectiflow.evaluate.frechet import FrechetEstimate, GaussianStatistics, frechet_estimate
from rectiflow.evaluate.judge import agrees
from rectiflow.evaluate.metrics import feature_distance, mse
from rectiflow.evaluate.templates import SIZE
from rectiflow.flow.solver import Solver
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import generate
from rectiflow.progress import progress
from rectiflow.straighten.text_cache import remembering_prompts

JUDGED = 600


def draw(
    model: FlowModel,
    seeds: Sequence[int],
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    solver: Solver | str | None = None,
    grid: str | Tensor | Sequence[float] | None = None,
    batch_size: int = 50,
) -> NDArray[np.uint8]:
    """What a model makes of the captions of scenes, from noise of the same seeds.

    Each caption is embedded once, and the empty prompt once; to embed none again in a second call,
    make both inside `straighten.text_cache.remembering_prompts(model)`. The network computes in
    the dtype it was loaded in.

    Args:
        model: From `load`.
        seeds: Of the scenes, and of the noise.
        num_inference_steps: As in `models.generate.generate`, like the next three.
        guidance_scale: Of it.
        solver: Of it.
        grid: Of it.
        batch_size: Pictures that go through the model together.

    Returns:
        uint8 [N, 64, 64, 3], in the order of the seeds.

    Raises:
        InputError: An argument is wrong.
    """
    if not seeds:
        raise InputError("no seeds: give one or more")
    drawn: list[NDArray[np.uint8]] = []
    with remembering_prompts(model):
        for start in _progress(range(0, len(seeds), batch_size), "draw"):
            batch = list(seeds[start : start + batch_size])
            with warnings.catch_warnings():
                # What becomes of a student at other numbers of steps is what is measured.
                warnings.filterwarnings("ignore", ".* is made for ")
                pictures = generate(
                    model,
                    [caption(sample(seed)) for seed in batch],
                    seed=batch,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    solver=solver,
                    grid=grid,
                    height=SIZE,
                    width=SIZE,
                )
            drawn.append(as_array(pictures))
    return np.concatenate(drawn)


def true_pictures(seeds: Sequence[int]) -> NDArray[np.uint8]:
    """The scenes themselves, rendered: uint8 [N, 64, 64, 3]."""
    return np.stack([render_array(sample(seed), SIZE) for seed in seeds])


def reference_statistics(clip: Clip, seeds: Sequence[int]) -> GaussianStatistics:
    """The statistics of the true pictures of scenes, which `score_pictures` compares with.

    Take the held-out scenes whose captions are drawn, as COCO's own images stand beside pictures
    of their captions. `GaussianStatistics.save` keeps them, and `digest()` names them.
    """
    parts = [
        GaussianStatistics.of(image_features(clip, true_pictures(seeds[start : start + 1000])))
        for start in range(0, len(seeds), 1000)
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    return whole


@dataclass(frozen=True, eq=False)
class PictureScores:
    """Every picture's figures, for paired comparisons; `summary` has the means."""

    frechet: FrechetEstimate
    """In the CLIP's features."""
    columns: dict[str, Column]
    """By picture, float64 [N]: `clip_score`; with a teacher `teacher_mse` and `teacher_clip`; and
    of those judged `emoji`, `background` and `count`, 1 where the judge agrees and 0 else."""
    judge: dict[str, Any]
    """As `emoji_models.agreement`; empty if nothing was judged."""

    def summary(self) -> dict[str, Any]:
        """Means and intervals of all of it.

        Returns:
            `{"n", "frechet_emoji_clip", "frechet_error", "frechet_left_out", "clip_score",
            "judge", "teacher_distance": {"mse", "clip"}}`: the Fréchet distance in emoji-clip
            features with its jackknife; the cosine of picture and caption; what the judge agrees
            with, as `emoji_models.agreement` has it; the mean squared distance of pixels in
            [0, 1] from the teacher's picture and the distance of the two in the CLIP's layers
            (`metrics.feature_distance`, which is `losses.ClipDistance`). Means are as by
            `described`; what was not asked for is not there.
        """
        distance = {
            name.removeprefix("teacher_"): described(column)
            for name, column in self.columns.items()
            if name.startswith("teacher_")
        }
        return {
            "n": len(self.columns["clip_score"]),
            "frechet_emoji_clip": self.frechet.value,
            "frechet_error": self.frechet.standard_error,
            "frechet_left_out": list(self.frechet.left_out),
            "clip_score": described(self.columns["clip_score"]),
            **({"judge": self.judge} if self.judge else {}),
            **({"teacher_distance": distance} if distance else {}),
        }


def score_pictures(
    pictures: Pictures,
    seeds: Sequence[int],
    *,
    clip: Clip,
    reference: GaussianStatistics,
    teacher: Pictures | None = None,
    judged: int = JUDGED,
) -> PictureScores:
    """How good pictures of the captions of scenes are.

    Args:
        pictures: One for each seed, from `draw`; RGB, 64 × 64.
        seeds: Of the scenes.
        clip: `emoji-clip`.
        reference: Of true pictures, by `reference_statistics`.
        teacher: The teacher's own pictures of the same seeds; None leaves its distances out.
        judged: How many of the first pictures the judge sees; 0 leaves him out.

    Raises:
        InputError: Numbers of pictures and seeds differ, or there are fewer than 3.
    """
    drawn = as_array(pictures)
    if len(drawn) != len(seeds):
        raise InputError(f"{len(drawn)} pictures of {len(seeds)} scenes: give one each")
    expected = [sample(seed) for seed in seeds]
    features = image_features(clip, drawn)
    columns = {"clip_score": clip_scores(clip, features, [caption(scene) for scene in expected])}
    if teacher is not None:
        columns |= _teacher_distance(clip, drawn, as_array(teacher))
    judgement: dict[str, Any] = {}
    if judged > 0:
        verdicts = judge_all([Image.fromarray(picture) for picture in drawn[:judged]])
        judgement = agreement(verdicts, expected[:judged])
        answers = [agrees(v, scene) for v, scene in zip(verdicts, expected, strict=False)]
        columns |= {q: np.array([float(a[q]) for a in answers]) for q in QUESTIONS}
    return PictureScores(frechet_estimate(features, reference), columns, judgement)


def _teacher_distance(
    clip: Clip, drawn: NDArray[np.uint8], teacher: NDArray[np.uint8]
) -> dict[str, Column]:
    if drawn.shape != teacher.shape:
        raise InputError(
            f"pictures {list(drawn.shape)} and the teacher's {list(teacher.shape)} do not pair up"
        )
    squared: list[Tensor] = []
    perceived: list[Tensor] = []
    for start in range(0, len(drawn), BATCH):
        a, b = (_in_unit_range(x[start : start + BATCH]) for x in (drawn, teacher))
        squared.append(mse(a, b))
        perceived.append(feature_distance(clip, a, b))
    return {
        "teacher_mse": torch.cat(squared).double().numpy(),
        "teacher_clip": torch.cat(perceived).double().numpy(),
    }


def _in_unit_range(pictures: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 255


def _progress(items: Any, label: str) -> Iterable[Any]:
    # On stderr.
    bar: Iterable[Any] = progress(items, desc=label, leave=False)
    return bar
