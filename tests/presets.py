"""Presets of the tests' own: the shipped ones may be tuned, what is promised of schemes may not."""

from __future__ import annotations

from rectiflow.invert import Preset

FIXED_POINT = Preset(
    reference="FTEdit, solved to a tolerance from a warm start",
    scheme="fixed_point",
    iterations=20,
    tolerance=3e-4,
    warm_start=True,
    method="two_branch",
    compensate="both",
    adaln_ratio=0.07,
    attention_ratio=0.35,
)
"""Two branches along a path that is solved for."""
