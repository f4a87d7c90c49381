"""Rows of figures as `measuring` writes them, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rectiflow.reproduce.figures import Figures
from rectiflow.reproduce.instaflow import instaflow
from rectiflow.reproduce.workshop import Workshop

Row = dict[str, Any]
ERROR = 0.1
"""The standard error of every figure: an interval is ± 0.196."""


def mean(value: float, error: float = ERROR) -> dict[str, Any]:
    """As `described`."""
    ends = [value - 1.96 * error, value + 1.96 * error]
    return {"mean": value, "standard_error": error, "interval": ends}


def pictures(frechet: float, likeness: dict[str, float] | None = None, **more: Any) -> Row:
    """A row of pictures with a Fréchet distance, and distances to other rows' pictures."""
    return {
        "n": 1000,
        "num_inference_steps": 1,
        "frechet_emoji_clip": frechet + 10,
        "frechet_error": ERROR / 2,
        "frechet_of_first": {"n": 1000, "value": frechet, "standard_error": ERROR},
        "clip_score": mean(0.5, 0.01),
        "likeness": {name: mean(value, 0.0001) for name, value in (likeness or {}).items()},
        "model": "m",
        **more,
    }


def flow(straightness: float, cost: float, errors: dict[str, float] | None = None) -> Row:
    """A row of trajectories."""
    return {
        "straightness": mean(straightness),
        "transport_cost": {"l2_squared": mean(cost), "l2": mean(cost**0.5)},
        "pair_error": {k: mean(value) for k, value in (errors or {}).items()},
        "model": "m",
    }


def figures(rows: dict[str, Row]) -> Figures:
    """These rows and no others."""
    made = Figures(Workshop(instaflow("full"), Path("there is no such folder"), torch.float32))
    made.rows = dict(rows)
    return made
