"""Rows of figures as `measuring` writes them, made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectiflow.reproduce.figures import Figures

Row = dict[str, Any]
ERROR = 0.1
"""The standard error of every figure."""
SAMPLES = "samples"
"""Where a row made here keeps what the real ones have in a file beside them."""


def spread(value: float, error: float, n: int = 400) -> NDArray[np.float64]:
    """Samples with this mean and standard error, others for every value."""
    z = np.random.default_rng(round(1e6 * abs(value))).normal(size=n)
    z = (z - z.mean()) / z.std(ddof=1)
    found: NDArray[np.float64] = value + error * math.sqrt(n) * z
    return found


def left_out(value: float, error: float) -> list[float]:
    """A figure without each of ten parts, whose jackknife error is this one."""
    parts = spread(value, error, 10)
    # The mean of all but one moves by a ninth of that one's distance.
    return (value + (value - parts) / 9).tolist()


def mean(value: float, error: float = ERROR) -> dict[str, Any]:
    """As `described`."""
    ends = [value - 1.96 * error, value + 1.96 * error]
    return {"mean": value, "standard_error": error, "interval": ends}


def pictures(
    frechet: float,
    likeness: dict[str, float] | None = None,
    recognised: float | None = None,
    **more: Any,
) -> Row:
    """A row of pictures with a Fréchet distance, and distances to other rows' pictures.

    The judge recognises this share of 100 emoji, the first of them; or was not asked.
    """
    near = likeness or {}
    columns = {f"likeness:{name}": spread(value, 0.0001) for name, value in near.items()}
    if recognised is not None:
        columns["emoji"] = (np.arange(100) < 100 * recognised).astype(float)
        ends = [recognised - 0.1, recognised + 0.1]
        keys = ("emoji", "background", "count")
        more["judge"] = dict.fromkeys(keys, recognised) | {"interval": dict.fromkeys(keys, ends)}
    return {
        "n": 1000,
        "num_inference_steps": 1,
        "frechet_emoji_clip": frechet + 10,
        "frechet_left_out": left_out(frechet + 10, ERROR / 2),
        "frechet_of_first": {
            "n": 1000,
            "value": frechet,
            "standard_error": ERROR,
            "left_out": left_out(frechet, ERROR),
        },
        "clip_score": mean(0.5, 0.01),
        "likeness": {name: mean(value, 0.0001) for name, value in near.items()},
        "model": "m",
        SAMPLES: columns,
        **more,
    }


def flow(straightness: float, cost: float, errors: dict[str, float] | None = None) -> Row:
    """A row of trajectories."""
    values = {"straightness": straightness, "l2_squared": cost, "l2": cost**0.5}
    values |= {f"error:{k}": value for k, value in (errors or {}).items()}
    return {
        **{name: mean(value) for name, value in values.items()},
        "model": "m",
        SAMPLES: {name: spread(value, ERROR) for name, value in values.items()},
    }


def figures(rows: dict[str, Row]) -> Figures:
    """These rows and no others."""
    return Figures(dict(rows), {name: row.get(SAMPLES, {}) for name, row in rows.items()})
