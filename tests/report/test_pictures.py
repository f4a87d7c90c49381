from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from rectiflow.report.pictures import (
    PANEL,
    amplification,
    difference,
    difference_map,
    picture,
    psnr,
)
from tests.report.samples import decoded, drawing


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (value, 0, 0))


def test_psnr_by_hand() -> None:
    assert psnr(flat(9), flat(9)) == math.inf
    # One channel of three is off by 51/255 = 0.2.
    assert psnr(flat(0), flat(51)) == pytest.approx(-10 * math.log10(0.04 / 3), abs=1e-5)


@pytest.mark.parametrize(("change", "factor"), [(0, 1), (255, 1), (130, 1), (120, 2), (1, 64)])
def test_amplification_makes_small_differences_visible(change: int, factor: int) -> None:
    values = difference(flat(0), flat(change))
    assert values.shape == (6, 8)
    assert values == pytest.approx(change / 255)
    assert amplification([values]) == factor


def test_the_map_is_black_where_nothing_changed_and_outlines_the_mask() -> None:
    values = np.zeros((40, 40), dtype=np.float32)
    values[10, 10] = 1
    mask = np.zeros((40, 40), dtype=bool)
    mask[20:30, 20:] = True
    shown = np.asarray(difference_map(values, 1, mask).convert("RGB")).astype(int)
    assert shown[0, 0].sum() < 10
    assert shown[10, 10].sum() > 500
    white = (shown == 255).all(axis=2)
    assert white[20, 20:].all() and white[20:30, 20].all() and white[29, 20:].all()
    assert not white[21:29, 21:].any()  # nor along the picture's own border
    assert white.sum() == 20 + 20 + 8


def test_copies_are_scaled_only_when_they_are_too_large() -> None:
    assert decoded(picture(drawing(0, (100, 50)), "x").uri).size == (100, 50)
    large = picture(drawing(0, (4 * PANEL, PANEL)), "x")
    assert (large.width, large.height) == (PANEL, PANEL // 4)
    thin = picture(drawing(0, (4 * PANEL, 1)), "x")
    assert (thin.width, thin.height) == (PANEL, 1)
