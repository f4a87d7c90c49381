"""The presets: the project's own, the paper's, and one per peer with its published settings."""

from __future__ import annotations

from typing import Any

from rectiflow.errors import InputError
from rectiflow.invert.preset import INVERSION_SETTINGS, Compensate, Feature, Inject, Preset

__all__ = [
    "INVERSION_SETTINGS",
    "PRESETS",
    "Compensate",
    "Feature",
    "Inject",
    "Preset",
    "get_preset",
    "method_name",
]

FTEDIT = "Unveil Inversion and Invariance in Flow Transformer for Versatile Image Editing (FTEdit)"

PRESETS: dict[str, Preset] = {
    "exact": Preset(
        reference=f"{FTEDIT}, solved to a tolerance from a warm start",
        iterations=20,
        tolerance=3e-4,
        warm_start=True,
        compensate="both",
        adaln_ratio=0.07,
        attention_ratio=0.35,
    ),
    "fast": Preset(
        reference=f"{FTEDIT}, on the inversion of DirectEdit",
        scheme="query_offset",
        source_features="inversion",
        compensate="both",
        adaln_ratio=0.07,
        attention_ratio=0.35,
    ),
    "ftedit": Preset(
        reference=f"{FTEDIT}, the benchmark script",
        grid="diffusers",
        iterations=2,
        average=True,
        guidance_scale=2.0,
        inject="all",
    ),
    "euler": Preset(
        reference="Euler inversion and the target prompt, nothing else",
        scheme="euler",
        time="cleaner",
        compensate="none",
        adaln_ratio=0.0,
        attention_ratio=0.0,
    ),
}


def get_preset(preset: str | Preset, **settings: Any) -> Preset:
    """A preset by name, with some of its fields replaced.

    Raises:
        InputError: there is no such preset or field, or a value is out of range or of no effect.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InputError(f"preset is {preset!r}; one of: {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    return preset.override(settings)


def method_name(preset: Preset, name: str | None = None) -> str:
    """What a preset is called, marked where fields were replaced.

    Args:
        preset: as it was used.
        name: the name it was asked for by; found by its reference when None.
    """
    if name is None:
        known = (n for n, other in PRESETS.items() if other.reference == preset.reference)
        name = next(known, "exact")
    return name if PRESETS.get(name) == preset else f"{name}, changed"
