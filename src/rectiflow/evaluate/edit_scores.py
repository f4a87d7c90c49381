"""How near edited pictures are to known right answers: a figure per edit, means, intervals, pairs.

Intervals are bootstrap intervals over edits: 95 % of the means of 10 000 draws with replacement.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectiflow.emoji.edits import EditCase
from rectiflow.emoji.render import render_array
from rectiflow.evaluate.emoji_models import Clip
from rectiflow.evaluate.metrics import (
    clip_score,
    feature_distance,
    masked_mse,
    masked_ssim,
    mse,
)

SIZE = 64
NO_OUTSIDE = 0.98
"""An edit whose mask covers more than this share of the picture has no outside."""
LEAST_ERROR = 1e-12
"""Squared error of pictures that are equal: 120 dB."""
DRAWS = 10_000

Column = NDArray[np.float64]
"""A figure of every edit; NaN where it has none."""
Columns = dict[str, Column]

METRICS = ("target_psnr", "inside_mse", "outside_mse", "outside_psnr", "outside_ssim")
"""What `score` always gives. MSE of pixels in [0, 1], PSNR in dB; outside is where the true target
does not differ from the source."""
CLIP_METRICS = ("feature_distance", "outside_feature_distance", "clip_score")
"""What it gives with a CLIP: `feature_distance` of metrics.py to the true target, whole and with
the edited area set to the target's in both, and the score of the result and the target prompt."""


def pictures(scenes: Sequence[Any]) -> Tensor:
    """Pictures of scenes, float32 ``[B, 3, 64, 64]`` in [0, 1]."""
    stacked = np.stack([render_array(scene, SIZE) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def masks(edits: Sequence[EditCase]) -> Tensor:
    """Where sources and true targets differ, bool ``[B, 1, 64, 64]``."""
    return torch.from_numpy(np.stack([case.mask(SIZE) for case in edits]))[:, None]


def score(images: Tensor, edits: Sequence[EditCase], clip: Clip | None = None) -> Columns:
    """Compare results ``[n, 3, 64, 64]`` in [0, 1] with the true targets.

    Args:
        images: the results.
        edits: what they are results of.
        clip: adds CLIP_METRICS.

    Returns:
        METRICS, and CLIP_METRICS with a CLIP. Figures of the outside are NaN for an edit that has
        none, and no result reaches more than 120 dB.
    """
    targets = pictures([case.target for case in edits])
    edited = masks(edits)
    has_outside = edited.float().mean((1, 2, 3)) < NO_OUTSIDE

    def outside(values: Tensor) -> Tensor:
        return torch.where(has_outside, values, torch.nan)

    outside_mse = outside(masked_mse(images, targets, edited, inside=False))
    found = {
        "target_psnr": _decibels(mse(images.double(), targets.double())),
        "inside_mse": masked_mse(images, targets, edited, inside=True),
        "outside_mse": outside_mse,
        "outside_psnr": _decibels(outside_mse),
        # Variances are small differences: in float32, equal pictures come to 0.999 only.
        "outside_ssim": outside(masked_ssim(images.double(), targets.double(), edited)),
    }
    if clip is not None:
        background = torch.where(edited, targets, images)
        found |= {
            "feature_distance": feature_distance(clip, images, targets),
            "outside_feature_distance": outside(feature_distance(clip, background, targets)),
            "clip_score": clip_score(clip, images, [case.target_prompt for case in edits]),
        }
    return {name: values.double().numpy() for name, values in found.items()}


def _decibels(error: Tensor) -> Tensor:
    return -10 * error.double().clamp_min(LEAST_ERROR).log10()


def interval(values: Column) -> tuple[float, float]:
    """The 95 % interval of a mean; draws are seeded, and the same for all columns of one length.

    Example:
        >>> interval(np.array([1.0, 1.0, 1.0]))
        (1.0, 1.0)
    """
    means = _shares(len(values)) @ values
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


@functools.lru_cache(maxsize=8)
def _shares(n: int) -> NDArray[np.float64]:
    """How much each of n values weighs in each draw's mean, ``[DRAWS, n]``."""
    drawn = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    places = (drawn + n * np.arange(DRAWS)[:, None]).ravel()
    return np.bincount(places, minlength=DRAWS * n).reshape(DRAWS, n) / n


def paired(one: Column, other: Column) -> dict[str, float]:
    """Mean difference per edit with its 95 % interval."""
    difference = one - other
    low, high = interval(difference)
    return {"mean": float(difference.mean()), "low": low, "high": high}


def tied(difference: Mapping[str, float]) -> bool:
    """Whether a paired difference could as well be none: its interval has 0 in it."""
    return difference["low"] <= 0 <= difference["high"]


def summary(columns: Columns, kinds: NDArray[np.str_]) -> dict[str, Any]:
    """Means of a method, with intervals, and of `target_psnr` by kind.

    Args:
        columns: of `score`, with `nfe` and `seconds` per edit.
        kinds: of the edits.
    """
    known = {name: values[~np.isnan(values)] for name, values in columns.items()}
    means = {name: float(v.mean()) if len(v) else None for name, v in known.items()}
    by_kind = {str(kind): columns["target_psnr"][kinds == kind] for kind in dict.fromkeys(kinds)}
    return {
        **{name: means[name] for name in ("target_psnr", "inside_mse", "outside_mse")},
        "outside_n": len(known["outside_mse"]),
        **{name: mean for name, mean in means.items()},
        "intervals": {
            name: list(interval(values))
            for name, values in known.items()
            if name != "seconds" and len(values)
        },
        "by_kind": {kind: float(values.mean()) for kind, values in by_kind.items()},
        "kind_intervals": {kind: list(interval(values)) for kind, values in by_kind.items()},
    }
