from __future__ import annotations

import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rectiflow.report.figures import (
    bar_with_intervals,
    inline_svg,
    line_plot,
    save_figure,
)
from rectiflow.report.plots import step_plot

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "logarithmic", "note"),
    [
        ([1e-6, 1e-4, 1e-2, 1e-3], True, "largest 0.01 at t = 0.50"),
        ([0.01, 0.02, 0.03, 0.02], False, "largest 0.03 at t = 0.50"),
        ([0, 0, 0, 0], False, "Exactly 0 in every step."),
        ([0, 1e-6, 1e-3, 0], True, "exactly 0 (2 steps)"),
        ([0.5, 0, 0.5, 0.5], False, "largest 0.5"),
        ([1e-3, NAN, INF, 1e-3], False, "Left out: 2 of 4 steps"),
        ([NAN] * 4, False, "No finite value."),
        ([1e-30, 1e30, 1.0, 1.0], True, "largest"),
    ],
)
def test_values_of_any_kind(values: list[float], logarithmic: bool, note: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot = step_plot([0, 0.25, 0.5, 0.75, 1], values, name="p", label="residual")
    ElementTree.fromstring(plot.svg)
    assert note in plot.note
    assert "residual" in plot.svg and "time t (0 noise, 1 image)" in plot.svg
    assert ("$" not in plot.svg) and ("nan" not in plot.svg.lower())
    has_powers = "−" in plot.svg and "10" in plot.svg
    assert not logarithmic or has_powers


def test_one_step() -> None:
    ElementTree.fromstring(step_plot([0, 1], [0.3], name="p", label="x").svg)


def test_inline_svg_is_small_themed_and_of_its_own_names() -> None:
    times, values = np.linspace(0, 1, 31), np.linspace(0.1, 0.2, 30)
    one, two = (step_plot(times, values, name=name, label="a & <b>").svg for name in ("u", "v"))
    assert len(one) < 25_000
    assert "<text" in one and "currentColor" in one and "var(--line)" in one
    assert (
        "<!DOCTYPE" not in one
        and "http" not in one
        and "<metadata" not in one
        and "<style" not in one
    )
    tree = ElementTree.fromstring(one)
    assert tree.attrib["role"] == "img" and tree.attrib["aria-label"].startswith("a & <b> over 30")
    ids = [{e.attrib["id"] for e in ElementTree.fromstring(s).iter() if "id" in e.attrib}
           for s in (one, two)]  # fmt: skip
    assert ids[0] and not ids[0] & ids[1]
    for element in tree.iter():
        if reference := element.attrib.get("href"):
            assert reference[1:] in ids[0]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_figures_for_the_docs(tmp_path: Path, ending: str) -> None:
    x = np.array([1, 2, 4, 8])
    lines = line_plot(
        {"euler": (x, 1 / x, np.stack([0.9 / x, 1.1 / x])), "heun": (x, 1 / x**2)},
        x_label="steps",
        y_label="error",
        title="Order",
        log_x=True,
        log_y=True,
    )
    bars = bar_with_intervals(
        {"exact − euler": (1.2, 0.8, 1.6), "exact − ftedit": (-0.2, -0.5, 0.1)},
        x_label="PSNR difference (dB)",
        reference=0,
    )
    for number, figure in enumerate((lines, bars)):
        path = save_figure(figure, tmp_path / f"{number}.{ending}")
        again = save_figure(figure, tmp_path / f"{number}-again.{ending}")
        assert path.read_bytes() == again.read_bytes()
        if ending == "png":
            assert Image.open(path).width > 800
        else:
            text = path.read_text(encoding="utf-8")
            assert "steps" in text or "PSNR difference (dB)" in text
            assert "euler" in text
    assert 'id="x-' in inline_svg(bars, name="x", label="bars")
