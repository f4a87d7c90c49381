"""The plots of a study, and its models' pictures from equal noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.emoji.vae import HELD_OUT
from rectiflow.files import replacing
from rectiflow.report.figures import bar_with_intervals, line_plot, save_figure
from rectiflow.report.sheet import contact_sheet
from rectiflow.reproduce.figures import Estimate, Figures
from rectiflow.reproduce.instaflow import ALPHAS, K_STEPS, SEEDS, SHARES
from rectiflow.reproduce.labels import REFLOWS, by_seed
from rectiflow.reproduce.measuring import has_pictures, pictures
from rectiflow.reproduce.study import trained_samples
from rectiflow.reproduce.workshop import Workshop

COLUMNS = 8
STEPS = (*K_STEPS, 25)
SHEET = {
    "teacher-at-25": "teacher, 25 steps",
    "emoji-2rf-at-25": "2-rectified, 25",
    "teacher-at-4": "teacher, 4",
    "emoji-2rf-at-2": "2-rectified, 2",
    "teacher-at-1": "teacher, 1",
    "emoji-2rf-at-1": "2-rectified, 1",
    "paper-2rf-0-at-1": "2-rectified, 1 (short)",
    "emoji-direct-at-1": "direct, 1",
    "paper-direct-0-at-1": "direct, 1 (short)",
    "paper-one-0-at-1": "distilled, 1 (short)",
    "emoji-instaflow-at-1": "emoji-instaflow, 1",
}
"""Rows of the sheet, from above."""


def draw_all(workshop: Workshop, figures: Figures, folder: Path) -> dict[str, str]:
    """Draw what the figures that are there allow.

    Args:
        workshop: Where the pictures lie.
        figures: What was measured.
        folder: Where plots and sheet go.

    Returns:
        What each shows, by the file's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, tuple[Callable[[Figures], Figure | None], str]] = {
        "steps.svg": (_by_steps, "Fréchet distance by the number of steps"),
        "alpha.svg": (_by_guidance, "Fréchet distance of emoji-2rf by its guidance α"),
        "settings.svg": (_by_setting, "One-step error after reflow by what was changed"),
    }
    drawn: dict[str, str] = {}
    for name, (plot, words) in plots.items():
        if (figure := plot(figures)) is not None:
            save_figure(figure, folder / name)
            drawn[name] = words
    if (figure := _by_samples(workshop, figures)) is not None:
        save_figure(figure, folder / "samples.svg")
        drawn["samples.svg"] = "Fréchet distance of one step by the samples trained on"
    return drawn


def draw_sheet(
    workshop: Workshop, figures: Figures, file: Path, before: Mapping[str, str]
) -> dict[str, str]:
    """Draw the first pictures of the rows of `SHEET` that are there.

    Args:
        workshop: Where the pictures lie.
        figures: Whose rows.
        file: The sheet; it stays if it is of the same rows and their pictures are gone.
        before: What it shows now, as returned.

    Returns:
        The rows that it shows, and their fingerprints; none if there is no sheet.
    """
    rows = {name: workshop.fingerprints[name] for name in SHEET if name in figures.rows}
    if rows and all(has_pictures(workshop, name) for name in rows):
        _sheet(workshop, list(rows), file)
        return rows
    if rows == before and file.is_file():
        return rows
    file.unlink(missing_ok=True)
    return {}


def _series(values: dict[float, Estimate]) -> tuple[list[float], list[float], list[list[float]]]:
    """x, y and both ends of the interval."""
    ends = [[one.low for one in values.values()], [one.high for one in values.values()]]
    return list(values), [one.mean for one in values.values()], ends


def _by_steps(figures: Figures) -> Figure | None:
    lines = {}
    for label, name in (("teacher, DPM-Solver++", "teacher"), ("2-rectified flow", "emoji-2rf")):
        found = {
            float(k): one
            for k in STEPS
            if (one := figures.of(f"{name}-at-{k}", "frechet")) is not None
        }
        if len(found) > 1:
            lines[label] = _series(found)
    if (one := figures.of("emoji-instaflow-at-1", "frechet")) is not None:
        lines["distilled"] = _series({1.0: one})
    if len(lines) < 2:
        return None
    figure = line_plot(lines, x_label="steps", y_label="Fréchet distance", log_x=True, log_y=True)
    return _ticks(figure, x=STEPS, y=(3, 10, 30))


def _by_guidance(figures: Figures) -> Figure | None:
    lines = {}
    for steps in (1, 8):
        found = {
            alpha: one
            for alpha in ALPHAS
            if (one := figures.of(f"alpha-{alpha}-at-{steps}", "frechet")) is not None
        }
        if len(found) > 1:
            lines[f"{steps} step{'s' * (steps > 1)}"] = _series(found)
    if not lines:
        return None
    return line_plot(lines, x_label="guidance α", y_label="Fréchet distance")


def _by_samples(workshop: Workshop, figures: Figures) -> Figure | None:
    """Whether reflow before distillation pays, by how much training there is."""
    lines = {}
    kinds = {
        "the paper's recipe": "paper-one",
        "direct distillation": "paper-direct",
        "direct distillation on 1024 pairs": "few-pairs-direct",
    }
    for label, kind in kinds.items():
        groups = [[f"{kind}-of-1-in-{share}"] for share in reversed(SHARES)]
        groups.append([f"{kind}-{seed}" for seed in SEEDS])
        found = {
            float(trained_samples(workshop.study, names[0])): one
            for names in groups
            if (one := figures.over([f"{name}-at-1" for name in names], "frechet")) is not None
        }
        if len(found) > 1:
            lines[label] = _series(found)
    if len(lines) < 2:
        return None
    figure = line_plot(
        lines, x_label="samples trained on", y_label="Fréchet distance, one step", log_x=True
    )
    return _ticks(figure, x=[int(count) for count in next(iter(lines.values()))[0]])


def _ticks(figure: Figure, x: Sequence[int], y: Sequence[int] = ()) -> Figure:
    """Plain numbers on a logarithmic axis: those that were measured, and no others."""
    (axes,) = figure.axes
    axes.set_xticks(x, [str(tick) for tick in x])
    axes.xaxis.set_minor_locator(NullLocator())
    if y:
        axes.set_yticks(y, [str(tick) for tick in y])
        axes.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _by_setting(figures: Figures) -> Figure | None:
    bars = {
        label: (one.mean, one.low, one.high)
        for name, label in REFLOWS.items()
        if (one := figures.over([f"flow-{seed}" for seed in by_seed(name)], "error:1")) is not None
    }
    if len(bars) < 3:
        return None
    return bar_with_intervals(bars, x_label="one-step error, per dimension")


def _sheet(workshop: Workshop, rows: list[str], file: Path) -> None:
    cells, words = [], []
    for name in rows:
        for column, picture in enumerate(pictures(workshop, name, COLUMNS)):
            cells.append(picture.astype(np.float64) / 255)
            words.append(SHEET[name] if column == 0 else caption(sample(HELD_OUT + column)))
    sheet = contact_sheet(cells, columns=COLUMNS, scale=2, captions=words)
    with replacing(file, shared=True) as unfinished:
        sheet.save(unfinished, format="PNG", optimize=True)
