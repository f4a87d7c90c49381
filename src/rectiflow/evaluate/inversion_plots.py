"""The plots of `inversion_error` and `straight_editing`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from rectiflow.report.figures import line_plot
from rectiflow.straighten.training_record import short_name

AXES = {
    "straight": "error of a step, relative to what it\nmoves in the straight coordinates",
    "diffusion": "error of a step, relative to what it\nmoves in a diffusion model's coordinates",
}


def error_plots(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """Errors along the way for the largest number of steps, and against the number of steps."""
    models: Mapping[str, Any] = figures["models"]
    most = max((int(n) for entry in models.values() for n in entry["steps"]), default=0)
    plots = {}
    for name, label in AXES.items():
        lines = {}
        for model, entry in models.items():
            found = entry["steps"][str(most)]
            y = np.array(found["errors"][f"{name}, noisier"]["per_step"], dtype=float)
            known = np.isfinite(y)
            lines[model] = (np.array(found["times"])[:-1][known], y[known])
        plots[f"along-{name}"] = _percent(
            line_plot(
                lines,
                x_label=f"time t that the step leads to (0 noise, 1 image), {most} steps",
                y_label=label,
                log_y=True,
            )
        )
        plots[f"steps-{name}"] = _against_steps(models, "errors", f"{name}, noisier", label)
    trips = {"flow": "euler, noisier", "diffusion": "ddim, noisier"}
    plots["round-trip"] = _against_steps(
        models, "round_trip", trips, "round trip by its own scheme:\nerror relative to the image"
    )
    return plots


def _against_steps(
    models: Mapping[str, Any], group: str, name: str | Mapping[str, str], label: str
) -> Figure:
    lines = {}
    for model, entry in models.items():
        key = name if isinstance(name, str) else name[entry["kind"]]
        points = [found[group][key] for found in entry["steps"].values()]
        lines[model] = (
            [int(count) for count in entry["steps"]],
            [point["mean"] for point in points],
            [[point["low"] for point in points], [point["high"] for point in points]],
        )
    figure = line_plot(lines, x_label="steps", y_label=label, log_x=True, log_y=True)
    return _percent(
        _at_steps(figure, [int(n) for found in models.values() for n in found["steps"]])
    )


def _percent(figure: Figure) -> Figure:
    """Shares on a logarithmic y axis in per cent."""
    (axes,) = figure.axes
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _at_steps(figure: Figure, counts: Iterable[int]) -> Figure:
    """Numbers of steps on a logarithmic x axis, those that were taken and no others."""
    (axes,) = figure.axes
    every = sorted(set(counts))
    axes.set_xticks(every, [str(count) for count in every])
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def straight_plots(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """Edits and round trips, one plot a method: against the number of steps, lines are models;
    edits against straightness as well, lines are numbers of steps.
    """
    models: Mapping[str, Any] = figures["models"]
    first = next(iter(models.values()))["steps"]
    methods = list(next(iter(first.values())))
    labels = {
        "target_psnr": "PSNR of edits to the\ntrue target, dB",
        "reconstruction_psnr": "PSNR of the uncompensated\nround trip, dB",
    }
    plots = {}
    for method in methods:
        for value, label in labels.items():
            lines = {}
            for model, entry in models.items():
                known = {n: found[method] for n, found in entry["steps"].items()}
                points = {int(n): found[value] for n, found in known.items() if value in found}
                if points:
                    s = entry["straightness"]["mean"]
                    lines[f"{short_name(Path(model))}, S = {s:.3g}"] = (
                        list(points),
                        [point["mean"] for point in points.values()],
                        [[p[end] for p in points.values()] for end in ("low", "high")],
                    )
            if lines:
                figure = line_plot(lines, x_label=f"steps ({method})", y_label=label, log_x=True)
                plots[f"{value.removesuffix('_psnr')}-{method}"] = _at_steps(
                    figure, [int(n) for entry in models.values() for n in entry["steps"]]
                )
        if len(models) > 1:
            plots[f"straightness-{method}"] = _against_straightness(
                models, method, f"{labels['target_psnr']} ({method})"
            )
    return plots


def _against_straightness(models: Mapping[str, Any], method: str, label: str) -> Figure:
    every = sorted(models.values(), key=lambda entry: float(entry["straightness"]["mean"]))
    x = [entry["straightness"]["mean"] for entry in every]
    lines = {}
    for count in every[0]["steps"]:
        points = [entry["steps"][count][method]["target_psnr"] for entry in every]
        lines[f"{count} steps"] = (
            x,
            [point["mean"] for point in points],
            [[point[end] for point in points] for end in ("low", "high")],
        )
    return line_plot(lines, x_label="S(Z) of the model, per dimension", y_label=label)
