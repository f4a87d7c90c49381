"""What was measured, by row, and what three seeds say together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rectiflow.reproduce.study import Flow, Pictures
from rectiflow.reproduce.workshop import Workshop

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % point of Student's t for so many seeds."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Args:
        mean: The figure.
        half: Half the interval's width; 0 if nothing is known of it.
        n: Training seeds behind it. Of one seed the interval is over pictures or trajectories.
    """

    mean: float
    half: float
    n: int = 1

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half

    def below(self, other: Estimate) -> bool:
        """Whether the whole interval lies below another."""
        return self.high < other.low


class Figures:
    """The rows of a study that are there.

    Args:
        workshop: Where they lie.
    """

    def __init__(self, workshop: Workshop) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        for item in workshop.study.items:
            if isinstance(item, Pictures | Flow) and workshop.there(item):
                text = workshop.path(item).read_text(encoding="utf-8")
                self.rows[item.name] = json.loads(text)

    def of(self, name: str, figure: str) -> Estimate | None:
        """A figure of a row with its interval over pictures or trajectories; None if not there.

        Args:
            name: Of the row.
            figure: `frechet` (of the first 1000 pictures), `frechet_of_all`, `clip_score`,
                `emoji`, `background`, `count`, `straightness`, `transport_cost`, `likeness:ROW` or
                `error:STEPS`.
        """
        row = self.rows.get(name)
        if row is None:
            return None
        kind, _, key = figure.partition(":")
        match kind:
            case "frechet":
                first = row["frechet_of_first"]
                return Estimate(first["value"], 1.96 * first["standard_error"])
            case "frechet_of_all":
                return Estimate(row["frechet_emoji_clip"], 1.96 * row["frechet_error"])
            case "emoji" | "background" | "count":
                if "judge" not in row:
                    return None
                low, high = row["judge"]["interval"][kind]
                return Estimate(row["judge"][kind], (high - low) / 2)
            case "clip_score" | "straightness":
                found = row.get(kind)
            case "transport_cost":
                found = row.get(kind, {}).get("l2_squared")
            case "likeness":
                found = row[kind].get(key)
            case "error":
                found = row.get("pair_error", {}).get(key)
            case _:
                raise KeyError(figure)
        return None if found is None else Estimate(found["mean"], 1.96 * found["standard_error"])

    def over(self, names: Iterable[str], figure: str) -> Estimate | None:
        """A figure of several training seeds: mean and t interval over those that are there."""
        found = [one for name in names if (one := self.of(name, figure)) is not None]
        return over_seeds(found)


def over_seeds(found: Sequence[Estimate]) -> Estimate | None:
    """The mean of seeds with its interval by Student's t; of one seed that seed's own.

    Example:
        >>> over_seeds([Estimate(1.0, 0.1), Estimate(2.0, 0.1), Estimate(3.0, 0.1)]).mean
        2.0
    """
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    means = [one.mean for one in found]
    spread = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    return Estimate(float(np.mean(means)), STUDENT_T[len(means)] * spread, len(means))
