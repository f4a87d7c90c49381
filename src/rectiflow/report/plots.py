"""The two plots of an edit report: one figure for each step of the inversion, against time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np

from rectiflow.report.figures import SERIES, STYLE, inline_svg, new_axes

LOG_FROM = 30.0
"""Largest over smallest value from which a logarithmic axis shows more than a linear one."""


@dataclass(frozen=True)
class StepPlot:
    """A plot as SVG markup, and what is to be said below it."""

    svg: str
    note: str


def step_plot(
    times: Sequence[float], values: Sequence[float], *, name: str, label: str, colour: int = 0
) -> StepPlot:
    """A value of every step, at the time where the step starts; logarithmic where that shows more.

    Args:
        times: The grid, one longer than `values`.
        values: Not negative. Zeros are drawn on the floor of a logarithmic axis as hollow
            points; what is not finite is left out and counted in the note.
        name: Unique within the page; letters, digits and hyphens.
        label: Of the y axis, with its unit.
        colour: Which of the series' colours.
    """
    t, y = np.asarray(times, dtype=float)[:-1], np.asarray(values, dtype=float)
    finite = np.isfinite(y)
    positive = finite & (y > 0)
    logarithmic = bool(positive.any()) and y[positive].max() > LOG_FROM * y[positive].min()
    figure, axes = new_axes()
    with matplotlib.rc_context(STYLE):
        drawn = positive if logarithmic else finite
        # A gap where a value is missing, rather than a line across it.
        axes.plot(t, np.where(drawn, y, np.nan), "o-", color=SERIES[colour], mew=0)
        notes = []
        if logarithmic:
            axes.set_yscale("log")
            low, high = y[positive].min(), y[positive].max()
            axes.set_ylim(low / 2, high * 2)
            if (zeros := finite & (y == 0)).any():
                floor = np.full(zeros.sum(), low / 1.6)
                axes.plot(t[zeros], floor, "o", mfc="none", mec=SERIES[colour], mew=1)
                notes.append(f"Hollow points on the floor: exactly 0 ({zeros.sum()} steps).")
        else:
            top = y[finite].max() if positive.any() else 1.0
            axes.set_ylim(-0.04 * top, 1.08 * top)
            axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("time t (0 noise, 1 image)")
        axes.set_ylabel(label)
    if not y.any():
        summary = "exactly 0 in every step"
    elif finite.any():
        worst = int(np.nanargmax(np.where(finite, y, np.nan)))
        summary = f"median {np.median(y[finite]):.2g}, largest {y[worst]:.2g} at t = {t[worst]:.2f}"
    else:
        summary = "no finite value"
    if missing := int((~finite).sum()):
        notes.append(f"Left out: {missing} of {len(y)} steps, whose value is not finite.")
    svg = inline_svg(figure, name=name, label=f"{label} over {len(y)} steps: {summary}.")
    notes.insert(0, summary[0].upper() + summary[1:] + ".")
    return StepPlot(svg, " ".join(notes))
