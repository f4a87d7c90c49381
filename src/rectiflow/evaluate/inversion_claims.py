"""What follows from the errors of inversion steps: models compared, and FTEdit's claim of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectiflow.evaluate.edit_scores import interval

Rows = NDArray[np.float64]
"""A figure of every image, ``[n]``."""

OWN = {"flow": ("straight, noisier", "euler"), "diffusion": ("diffusion, noisier", "ddim")}
"""In which coordinates a model is inverted, and by which scheme."""


def compared(
    rows: Mapping[str, Mapping[int, Mapping[str, Rows]]], kinds: Mapping[str, str]
) -> list[dict[str, Any]]:
    """How many times a later model's errors are an earlier one's, in each number of steps.

    Ratios are geometric means over images, which are the same for all models.

    Args:
        rows: figures of every image, by model, number of steps and name.
        kinds: of the models.
    """
    names = list(rows)
    pairs = [(one, other) for i, other in enumerate(names) for one in names[i + 1 :]]
    result = []
    for one, other in pairs:
        for count in rows[one]:
            mine, others = rows[one][count], rows[other][count]
            (own, scheme), (its, its_scheme) = OWN[kinds[one]], OWN[kinds[other]]
            ratios = {"own": ratio(mine[own], others[its])}
            ratios |= {name: ratio(mine[name], others[name]) for name in mine if name in others}
            ratios["own round trip"] = ratio(
                mine[f"round trip, {scheme}, noisier"], others[f"round trip, {its_scheme}, noisier"]
            )
            result.append(
                {"model": one, "to": other, "kinds": [kinds[one], kinds[other]], "steps": count}
                | {"errors": [float(mine[own].mean()), float(others[its].mean())]}
                | {"ratios": ratios}
            )
    return result


def ratio(one: Rows, other: Rows) -> dict[str, float]:
    """The geometric mean of one / other with its 95 % interval."""
    tiny = np.finfo(np.float64).tiny
    logs = np.log(np.maximum(one, tiny)) - np.log(np.maximum(other, tiny))
    low, high = interval(logs)
    return {
        "mean": float(np.exp(logs.mean())),
        "low": float(np.exp(low)),
        "high": float(np.exp(high)),
    }


def sentence(pair: Mapping[str, Any]) -> str:
    """What follows from one comparison, and for a flow and a diffusion model FTEdit's claim."""
    ratios, (mine, others) = pair["ratios"], pair["errors"]
    how = {"flow": "Euler's inversion", "diffusion": "DDIM inversion"}
    said = (
        f"In {pair['steps']} steps, each in its own coordinates and on its own grid, a step of "
        f"{how[pair['kinds'][0]]} of {pair['model']} is off by {mine:.1%} of what it moves and one "
        f"of {how[pair['kinds'][1]]} of {pair['to']} by {others:.1%}: {_times(ratios['own'])} as "
        f"much; in the straight coordinates {_times(ratios['straight, noisier'])}, in a diffusion "
        f"model's {_times(ratios['diffusion, noisier'])}; and the round trip ends "
        f"{_times(ratios['own round trip'])} as far away."
    )
    if sorted(pair["kinds"]) != ["diffusion", "flow"]:
        return said
    flow_first = pair["kinds"][0] == "flow"
    verdicts = [
        verdict(ratios[name], flow_first)
        for name in ("own", "straight, noisier", "diffusion, noisier", "own round trip")
    ]
    own, straight, diffusion, trip = verdicts
    return (
        f"{said} That a rectified flow suffers more than DDIM {own} in their own coordinates, "
        f"{straight} in the straight ones, {diffusion} in a diffusion model's, and {trip} of the "
        "round trip."
    )


def verdict(found: Mapping[str, float], more: bool) -> str:
    """Whether a ratio is above 1 (or below, if not `more`), by its interval."""
    low, high = (found["low"], found["high"]) if more else (1 / found["high"], 1 / found["low"])
    if low > 1:
        return "holds"
    return "does not hold" if high < 1 else "is not decided"


def _times(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.2f} times (95 % interval {found['low']:.2f} to {found['high']:.2f})"
