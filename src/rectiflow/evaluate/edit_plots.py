"""The plots of the ablations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from rectiflow.report.figures import bar_with_intervals, line_plot


def ablation_plots(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """The plots of an ablation by what they show: `target_psnr`, and the reconstruction if known.

    Values that are numbers are an axis; others get a bar each.
    """
    plots = {"target_psnr": _plot(figures, "target_psnr", "low", "high", "PSNR to the target, dB")}
    points = next(iter(figures["series"].values()))["points"]
    if "reconstruction_psnr" in points[0]:
        plots["reconstruction_psnr"] = _plot(
            figures,
            "reconstruction_psnr",
            "reconstruction_low",
            "reconstruction_high",
            "PSNR of the uncompensated\nreconstruction, dB",
        )
    return plots


def _plot(figures: Mapping[str, Any], value: str, low: str, high: str, label: str) -> Figure:
    series: Mapping[str, Any] = {name: entry["points"] for name, entry in figures["series"].items()}
    if any(isinstance(point["value"], str) for points in series.values() for point in points):
        bars = {
            f"{name}: {point['value']}": (point[value], point[low], point[high])
            for name, points in series.items()
            for point in points
        }
        return bar_with_intervals(bars, x_label=label)
    lines = {
        name: (
            [point["value"] for point in points],
            [point[value] for point in points],
            [[point[low] for point in points], [point[high] for point in points]],
        )
        for name, points in series.items()
    }
    return line_plot(lines, x_label=figures["label"], y_label=label)
