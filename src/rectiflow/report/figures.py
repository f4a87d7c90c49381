"""Line plots and bars with intervals, in one look, as files for the docs or inline SVG for pages.

Figures are made without pyplot, so that nothing is global and nothing needs closing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from rectiflow.files import replacing

INK, FAINT, GRID = "#1d1f24", "#6a6e76", "#dddedb"
SERIES = ("#2f5fd0", "#c2601c", "#1f7d52", "#8a4fb5", "#b23a48", "#5b6470")

# Inside a page, colours follow the page's theme.
_THEME = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    GRID: "var(--line)",
    **{colour: f"var(--series-{i}, {colour})" for i, colour in enumerate(SERIES)},
}

# Any: matplotlib types the keys as literals.
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "rectiflow",  # the same figure is the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.visible": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "mathtext.default": "regular",
}


def new_axes(width: float = 4.4, height: float = 2.5) -> tuple[Figure, Axes]:
    """An empty plot in the house's look; sizes in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def line_plot(
    series: Mapping[str, tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[float, float] = (5.6, 3.4),
) -> Figure:
    """Lines, each with an optional interval around it.

    Args:
        series: By name: (x, y) or (x, y, [2, n] low and high).
        x_label: With its unit.
        y_label: With its unit.
        title: Above the plot.
        log_x: Whether the x axis is logarithmic.
        log_y: Whether the y axis is.
        size: Inches.
    """
    figure, axes = new_axes(*size)
    with matplotlib.rc_context(STYLE):
        for index, (name, (x, y, *interval)) in enumerate(series.items()):
            colour = SERIES[index % len(SERIES)]
            if interval:
                low, high = np.asarray(interval[0])
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, y, marker="o", color=colour, label=name)
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if title:
            axes.set_title(title)
        if len(series) > 1:
            axes.legend()
    return figure


def bar_with_intervals(
    bars: Mapping[str, tuple[float, float, float]],
    *,
    x_label: str,
    title: str = "",
    reference: float | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Horizontal bars, one below the other, each with its interval.

    Args:
        bars: By name: value, low and high.
        x_label: With its unit.
        title: Above the plot.
        reference: Where to draw a line to compare with, for example 0 for differences.
        size: Inches; the height follows the number of bars when None.
    """
    figure, axes = new_axes(*(size or (5.6, 0.9 + 0.32 * len(bars))))
    with matplotlib.rc_context(STYLE):
        values = [value for value, _, _ in bars.values()]
        errors = (
            [value - low for value, low, _ in bars.values()],
            [high - value for value, _, high in bars.values()],
        )
        rows = range(len(bars))
        axes.barh(rows, values, height=0.62, color=SERIES[0], alpha=0.85)
        axes.errorbar(values, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
        axes.set_yticks(rows, list(bars))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        if reference is not None:
            axes.axvline(reference, color=FAINT, linewidth=1)
        axes.set_xlabel(x_label)
        if title:
            axes.set_title(title)
    return figure


def save_figure(figure: Figure, path: str | PathLike[str]) -> Path:
    """Save a figure as SVG or PNG, by the name's ending, and return its path.

    Raises:
        ValueError: Matplotlib has no format of this ending.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    undated = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context(STYLE), replacing(path, shared=True) as unfinished:
        figure.savefig(unfinished, format=kind, dpi=200, metadata=undated)
    return path


def inline_svg(figure: Figure, *, name: str, label: str) -> str:
    """A figure as SVG markup for a page: themed, with ids of its own and a description.

    Args:
        figure: The figure.
        name: Starts every id in it; unique within the page, letters, digits and hyphens.
        label: What the plot shows, for those who do not see it.
    """
    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its style element would apply to all of the page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick)_\d+"', "", svg
    )
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for colour, themed in _THEME.items():
        svg = svg.replace(colour, themed)
    svg = re.sub(r"\n\s*", "\n", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg role="img" aria-label="{escaped}" {view[0]} stroke-linejoin="round">'
    return head + svg[svg.index(">") + 1 :].strip()
