"""What was measured, by row, and what three seeds say together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectiflow.evaluate.flow_quality import described
from rectiflow.evaluate.frechet import jackknife_error
from rectiflow.guarded import read_json
from rectiflow.reproduce.measuring import samples
from rectiflow.reproduce.record import Record
from rectiflow.reproduce.study import Flow, Pictures
from rectiflow.reproduce.workshop import Workshop

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % point of Student's t with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Args:
        mean: The figure.
        half: Half the interval's width; 0 if nothing is known of it.
        n: Training seeds behind it. Of one seed the interval is over pictures or trajectories.
        ends: Of an interval that is not even about the mean, such as that of a share.
    """

    mean: float
    half: float
    n: int = 1
    ends: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half if self.ends is None else self.ends[0]

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half if self.ends is None else self.ends[1]

    def scaled(self, factor: float) -> Estimate:
        """The figure in another unit."""
        ends = None if self.ends is None else (factor * self.ends[0], factor * self.ends[1])
        return Estimate(factor * self.mean, factor * self.half, self.n, ends)

    def below(self, other: Estimate) -> bool:
        """Whether the whole interval lies below another."""
        return self.high < other.low


Cell = tuple[str, str]
"""A row's name, and a figure's as `Figures.of` takes it."""
COLUMNS = {"transport_cost": "l2_squared"}
"""Where samples have another name than the figure."""


@dataclass(frozen=True)
class Figures:
    """The rows of a study that are there.

    Args:
        rows: By name.
        samples: Of each row the figures of every picture or trajectory. Without them differences
            are known of Fréchet distances, over training seeds, and where `gaps` has them.
        gaps: Differences of two rows, mean and half of the interval; those that are asked for are
            remembered here.
    """

    rows: dict[str, dict[str, Any]]
    samples: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    gaps: dict[tuple[Cell, Cell], tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, workshop: Workshop, before: Record | None = None) -> Figures:
        """Those that lie in a workshop, and what a record has beside them."""
        found = cls({})
        old = before.rows if before else {}
        for item in workshop.study.items:
            if isinstance(item, Pictures | Flow) and workshop.there(item):
                found.rows[item.name] = read_json(workshop.path(item))
                found.samples[item.name] = samples(workshop, item)
            elif item.name in old:
                found.rows[item.name] = old[item.name]
        for row, figure, other, its, mean, half in before.gaps if before else ():
            found.gaps[(row, figure), (other, its)] = mean, half
        return found

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
                value = row["frechet_of_first"]["value"]
                return Estimate(value, _jackknife_half(self._left_out(name, figure)))
            case "frechet_of_all":
                value = row["frechet_emoji_clip"]
                return Estimate(value, _jackknife_half(self._left_out(name, figure)))
            case "emoji" | "background" | "count":
                if "judge" not in row:
                    return None
                low, high = row["judge"]["interval"][kind]
                return Estimate(row["judge"][kind], (high - low) / 2, ends=(low, high))
            case "likeness":
                found = row[kind].get(key)
            case "clip_score" | "straightness" | "transport_cost" | "error":
                found = row.get(COLUMNS.get(figure, figure))
            case _:
                raise KeyError(figure)
        return None if found is None else Estimate(found["mean"], 1.96 * found["standard_error"])

    def over(self, names: Iterable[str], figure: str) -> Estimate | None:
        """A figure of several training seeds: mean and t interval over those that are there."""
        return self.mean([(name, figure) for name in names])

    def mean(self, cells: Iterable[Cell]) -> Estimate | None:
        """Likewise, where the figure has another name in every row."""
        found = [one for cell in cells if (one := self.of(*cell)) is not None]
        return over_seeds(found)

    def difference(self, cells: Sequence[Cell], others: Sequence[Cell]) -> Estimate | None:
        """The figures of some rows less those of others, of the same captions and noise.

        Over the training seeds that both have, or for one seed over pictures or trajectories; in
        pairs either way, so that what is hard for all does not blur what is different.

        Args:
            cells: One for each training seed.
            others: Likewise.
        """
        pairs = [
            (a, b)
            for a, b in zip(cells, others, strict=True)
            if self.of(*a) is not None and self.of(*b) is not None
        ]
        if len(pairs) == 1:
            return self._paired(*pairs[0])  # None if the samples of either are not kept
        gaps = []
        for a, b in pairs:
            one, other = self.of(*a), self.of(*b)
            assert one is not None and other is not None
            gaps.append(Estimate(one.mean - other.mean, 0.0))
        return over_seeds(gaps)

    def _left_out(self, name: str, figure: str) -> list[float]:
        """A Fréchet distance without each of its parts."""
        row = self.rows[name]
        found: list[float] = (
            row["frechet_of_first"]["left_out"] if figure == "frechet" else row["frechet_left_out"]
        )
        return found

    def _paired(self, cell: Cell, other: Cell) -> Estimate | None:
        """The difference of two rows' means, from the differences of their samples."""
        if cell[1] in ("frechet", "frechet_of_all"):
            mine, theirs = self.of(*cell), self.of(*other)
            assert mine is not None and theirs is not None
            a, b = (self._left_out(*each) for each in (cell, other))
            return Estimate(mine.mean - theirs.mean, _jackknife_half(np.subtract(a, b).tolist()))
        if cell[0] in self.samples and other[0] in self.samples:
            one, two = (self.samples[name][COLUMNS.get(key, key)] for name, key in (cell, other))
            n = min(len(one), len(two))
            found = described(one[:n] - two[:n])
            self.gaps[cell, other] = found["mean"], 1.96 * found["standard_error"]
        gap = self.gaps.get((cell, other))
        return None if gap is None else Estimate(*gap)


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
    return Estimate(float(np.mean(means)), STUDENT_T[len(means) - 2] * spread, len(means))


def _jackknife_half(left_out: Sequence[float]) -> float:
    """Half the interval of a figure of which the values without each part are known."""
    return STUDENT_T[len(left_out) - 2] * jackknife_error(left_out)
