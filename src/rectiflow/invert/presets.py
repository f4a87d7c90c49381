"""Presets: what an inversion and an edit are told, as data. Every field can be overridden."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from rectiflow.errors import InputError

Compensate = Literal["source", "both", "none"]
Inject = Literal["image", "all"]
Feature = Literal["query", "key", "value"]

INVERSION_SETTINGS = (
    "num_inference_steps",
    "grid",
    "scheme",
    "iterations",
    "tolerance",
    "average",
    "warm_start",
    "time",
)
"""The fields of a preset that are settled once an image has been inverted."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of one method, from the image to the noise and back with another prompt."""

    reference: str
    """The paper it is from."""
    num_inference_steps: int = 30
    grid: str = "shifted"
    """A grid of `make_grid`; `"shifted"` takes the model's own shift."""
    # Inversion.
    scheme: Literal["fixed_point", "euler"] = "fixed_point"
    iterations: int = 5
    """At most iterations + 1 evaluations of the network in a step; 0 is Euler's inversion."""
    tolerance: float = 0.0
    """A row is done with a step once its state moves by less than this, relative to its size."""
    average: bool = False
    """Take the mean of all iterates (the paper's choice) rather than the last."""
    warm_start: bool = False
    """Begin a step with the velocity of the step before it."""
    time: Literal["noisier", "cleaner"] = "noisier"
    """At which end of the step Euler's inversion tells the network to be."""
    # Editing.
    guidance_scale: float = 1.0
    """Of the target prompt; inversion runs without guidance."""
    compensate: Compensate = "source"
    """Whether the correction that returns the source reaches the source's row or every row."""
    adaln_ratio: float = 1.0
    """Over this share of the steps, unchanged words keep the source's text features."""
    attention_ratio: float = 0.15
    """Over this share of the steps, the source's attention features are injected."""
    inject: Inject = "image"
    """Whose attention features: those of the image tokens, or of the text tokens too."""
    features: tuple[Feature, ...] = ("value",)
    mask_threshold: float | None = None
    """Above 0, a mask is derived from where the prompts disagree: cells whose disagreement is
    below this share of the largest return to the source. A mask that is given goes before it."""

    def override(self, settings: dict[str, Any]) -> Preset:
        """This preset with some fields replaced; a value of None leaves a field alone.

        Raises:
            InputError: there is no such field, or its value is out of range.
        """
        known = {field.name for field in dataclasses.fields(self)}
        for name in settings:
            if name not in known:
                raise InputError(f"unknown setting {name!r}; there are: {', '.join(sorted(known))}")
        given = {name: value for name, value in settings.items() if value is not None}
        changed = dataclasses.replace(self, **given)
        changed.check()
        return changed

    def inverted_as(self, other: Preset) -> Preset:
        """This preset's editing after another's inversion."""
        return dataclasses.replace(
            self, **{name: getattr(other, name) for name in INVERSION_SETTINGS}
        )

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: names the first field that is out of range, and its range.
        """
        if self.num_inference_steps < 1:
            raise InputError(f"num_inference_steps is {self.num_inference_steps}; at least 1")
        if self.iterations < 0:
            raise InputError(f"iterations is {self.iterations}; at least 0")
        if self.tolerance < 0:
            raise InputError(f"tolerance is {self.tolerance}; at least 0")
        if not math.isfinite(self.guidance_scale):
            raise InputError(f"guidance_scale is {self.guidance_scale}; a finite number")
        for name in ("adaln_ratio", "attention_ratio", "mask_threshold"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; from 0 to 1")
        _check_choice("compensate", self.compensate, ("source", "both", "none"))
        _check_choice("inject", self.inject, ("image", "all"))
        _check_choice("scheme", self.scheme, ("fixed_point", "euler"))
        _check_choice("time", self.time, ("noisier", "cleaner"))
        for feature in self.features:
            _check_choice("features", feature, ("query", "key", "value"))


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
        InputError: there is no such preset or field, or a value is out of range.
    """
    if isinstance(preset, str):
        _check_choice("preset", preset, tuple(PRESETS))
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


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; one of: {', '.join(choices)}")
