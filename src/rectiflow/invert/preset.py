"""A preset: what an inversion and an edit are told, as data. Every field can be overridden."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_type_hints

from rectiflow.arguments import LARGEST_SEED, check_type
from rectiflow.errors import InputError, nearest
from rectiflow.flow.grid import MOST_STEPS, active_steps
from rectiflow.models.guidance import check_guidance

SchemeName = Literal[
    "euler",
    "ddim",
    "fixed_point",
    "query_offset",
    "two_step",
    "midpoint",
    "fireflow",
    "uni_inv",
    "rf_inversion",
    "dna",
    "interpolation",
    "renoising",
]
MethodName = Literal["two_branch", "uni_edit", "flow_edit", "dna_edit", "rf_inversion"]
Compensate = Literal["source", "both", "none"]
Inject = Literal["image", "all"]
Feature = Literal["query", "key", "value"]
Rounding = Literal["down", "nearest"]
Disagreement = Literal["absolute", "signed"]

SCHEME_FIELDS: dict[str, tuple[str, ...]] = {
    "euler": ("inversion_prompt", "time"),
    "ddim": ("inversion_prompt", "time"),
    "fixed_point": (
        "inversion_prompt",
        "iterations",
        "tolerance",
        "average",
        "warm_start",
        "stop_at_query",
    ),
    "query_offset": ("inversion_prompt", "time"),
    "two_step": ("inversion_prompt",),
    "midpoint": ("inversion_prompt",),
    "fireflow": ("inversion_prompt",),
    "uni_inv": ("inversion_prompt",),
    "rf_inversion": ("inversion_prompt", "gamma", "noise_seed"),
    "dna": ("inversion_prompt", "noise_seed"),
    "interpolation": ("noise_seed",),
    "renoising": ("noise_seed",),
}
"""Which fields a scheme reads beside those that all of them share."""
CONTROL_FIELDS = (
    "compensate",
    "adaln_ratio",
    "attention_ratio",
    "inject",
    "features",
    "first_site",
    "last_block",
    "source_features",
    "keep_features",
    "mask_threshold",
    "mask_from",
)
METHOD_FIELDS: dict[str, tuple[str, ...]] = {
    "two_branch": CONTROL_FIELDS,
    "uni_edit": ("omega", "disagreement"),
    "flow_edit": ("noise_seed", "n_avg", "n_min", "source_guidance_scale"),
    "dna_edit": ("eta",),
    "rf_inversion": ("eta", "eta_ratio"),
}
"""Likewise of editing methods."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of one method, from the image to the noise and back with another prompt."""

    reference: str
    """The paper it is from."""
    num_inference_steps: int = 30
    """Of the whole way from noise to image."""
    grid: str = "shifted"
    """A grid of `make_grid`; `"shifted"` takes the model's own shift. Or `"student"`, the model's
    `student_grid`: of a diffusion model the timesteps of diffusers' ``"trailing"`` spacing,
    whatever its scheduler says. Or `"leading"`, those of the spacing that diffusers' DDIM has by
    default."""
    strength: float = 1.0
    """The share of the steps that are gone, back and forth, from the image's end on."""
    rounding: Rounding = "down"
    """Of that share, to whole steps."""
    # Inversion.
    scheme: SchemeName = "fixed_point"
    """A name of `SCHEMES`."""
    inversion_prompt: Literal["source", "empty"] = "source"
    """The prompt under which the image is inverted; it is edited as an image of the source's."""
    iterations: int = 5
    """At most iterations + 1 evaluations of the network in a step; 0 is Euler's inversion."""
    tolerance: float = 0.0
    """A row is done with a step once its state moves by less than this, relative to its size."""
    average: bool = False
    """Take the mean of all iterates (the paper's choice) rather than the last."""
    warm_start: bool = False
    """Begin a step with the velocity of the step before it."""
    stop_at_query: bool = False
    """Take the point where the field was last asked, whose velocity and features are known."""
    time: Literal["noisier", "cleaner"] = "noisier"
    """At which end of the step Euler's, DDIM's or DirectEdit's inversion tells the network to
    be."""
    gamma: float = 0.5
    """How strongly RF-Inversion is drawn to its noise."""
    noise_seed: int = 0
    """Of the noise that a scheme or method draws."""
    # Editing.
    method: MethodName = "two_branch"
    """A name of `METHODS`."""
    guidance_scale: float = 1.0
    """Of the target prompt, with diffusers' meaning: up to 1 is none. Inversion has none."""
    true_cfg_scale: float = 1.0
    """α of a network that takes `guidance_scale` as an input (FLUX.1-dev)."""
    source_guidance_scale: float = 1.0
    """Of the source prompt where a method asks for it while editing."""
    compensate: Compensate = "source"
    """Whether the correction that returns the source reaches the source's row or every row."""
    adaln_ratio: float = 1.0
    """Over this share of the steps, unchanged words keep the source's text features."""
    attention_ratio: float = 0.15
    """Over this share of the steps, the source's attention features are injected."""
    inject: Inject = "image"
    """Whose attention features: those of the image tokens, or of the text tokens too."""
    features: tuple[Feature, ...] = ("value",)
    first_site: float = 0.0
    """Features are injected behind this share of the network's attentions."""
    last_block: bool = False
    """Features are injected in a last block, too, where the text stream ends (Stable Diffusion
    3)."""
    source_features: Literal["recompute", "inversion"] = "recompute"
    """Whether the source's row runs beside the target's while its features are needed, or they are
    kept from the inversion."""
    keep_features: Literal["memory", "cpu", "disk"] = "memory"
    """Where: on the device, in main memory, or in a temporary folder."""
    mask_threshold: float | None = None
    """Above 0, a mask is derived from where the prompts disagree: cells whose disagreement is
    below this share of the largest return to the source. A mask that is given goes before it."""
    mask_from: Literal["velocity", "attention"] = "velocity"
    """Whether that disagreement is of the velocities, or it is where the image attends to the words
    that changed."""
    eta: float = 0.8
    """How much of the prompt's own way is kept (DNAEdit), or how strongly the image draws
    (RF-Inversion)."""
    eta_ratio: float = 0.25
    """The share of the steps in which the image draws (RF-Inversion)."""
    omega: float = 5.0
    """How far UniEdit goes beyond the target's velocity, away from the source's."""
    disagreement: Disagreement = "absolute"
    """What UniEdit's map is of: the mean over channels of the difference's size (the paper, and its
    code for FLUX), or of the difference with its sign (its code for Stable Diffusion 3)."""
    n_avg: int = 1
    """Draws of noise that FlowEdit averages over in a step."""
    n_min: int = 0
    """FlowEdit's last steps that are plain sampling."""

    @property
    def steps(self) -> int:
        """How many steps are gone: `strength` of `num_inference_steps`."""
        if self.rounding == "nearest":
            return round(self.strength * self.num_inference_steps)
        return active_steps(self.strength, self.num_inference_steps)

    def override(self, settings: dict[str, Any]) -> Preset:
        """This preset with some fields replaced; a value of None leaves a field alone.

        Raises:
            InputError: there is no such field, its value is out of range, or the scheme and the
                method do not use it.
        """
        known = {field.name for field in dataclasses.fields(self)}
        for name in settings:
            if name not in known:
                close = nearest(name, known) or f"; there are: {', '.join(sorted(known))}"
                raise InputError(f"unknown setting {name!r}{close}")
        given = {name: value for name, value in settings.items() if value is not None}
        if isinstance(given.get("features"), list):
            given["features"] = tuple(given["features"])
        changed = dataclasses.replace(self, **given)
        changed.check()
        changed.check_used(given)
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
        for name, hint in _types().items():
            check_type(name, getattr(self, name), hint)
        for name, least in (("num_inference_steps", 1), ("iterations", 0), ("tolerance", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; at least {least}")
        if self.num_inference_steps > MOST_STEPS:
            raise InputError(
                f"num_inference_steps is {self.num_inference_steps}; at most {MOST_STEPS}"
            )
        for name, least in (("n_avg", 1), ("n_min", 0), ("noise_seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; at least {least}")
        if self.noise_seed > LARGEST_SEED:
            raise InputError(f"noise_seed is {self.noise_seed}; at most 2**63 - 1")
        for name in ("guidance_scale", "true_cfg_scale", "source_guidance_scale"):
            check_guidance(name, getattr(self, name))
        if not math.isfinite(self.omega):
            raise InputError(f"omega is {self.omega}; a finite number")
        for name in RATIOS:
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; from 0 to 1")
        if self.steps < 1:
            raise InputError(
                f"strength {self.strength} of {self.num_inference_steps} steps leaves none: "
                "raise one of them"
            )
        if self.n_min > self.steps:
            raise InputError(f"n_min is {self.n_min}; at most the {self.steps} steps that are gone")
        if self.average and self.stop_at_query:
            raise InputError("average and stop_at_query exclude each other: choose one")
        _check_choice("compensate", self.compensate, get_args(Compensate))
        _check_choice("inject", self.inject, get_args(Inject))
        _check_choice("rounding", self.rounding, get_args(Rounding))
        _check_choice("disagreement", self.disagreement, get_args(Disagreement))
        _check_choice("scheme", self.scheme, get_args(SchemeName))
        _check_choice("method", self.method, get_args(MethodName))
        _check_choice("time", self.time, ("noisier", "cleaner"))
        _check_choice("inversion_prompt", self.inversion_prompt, ("source", "empty"))
        _check_choice("source_features", self.source_features, ("recompute", "inversion"))
        _check_choice("keep_features", self.keep_features, ("memory", "cpu", "disk"))
        _check_choice("mask_from", self.mask_from, ("velocity", "attention"))
        self.check_path_is_read()
        if self.mask_from == "attention" and not self.mask_threshold:
            raise InputError("mask_from is 'attention' without a mask_threshold: give one above 0")
        for feature in self.features:
            _check_choice("features", feature, get_args(Feature))
        self.check_inversion_prompt()
        kept = (self.method, self.source_features) == ("two_branch", "inversion")
        if self.inversion_prompt == "empty" and kept:
            raise InputError(
                "inversion_prompt is 'empty', and features kept from that inversion would not be "
                "the source prompt's: give source_features 'recompute', or leave inversion_prompt "
                "out"
            )

    def check_inversion_prompt(self) -> None:
        """Refuse an inversion under the empty prompt where the edit lives by the source's.

        Raises:
            InputError: the method takes the inversion's own velocities for the source's.
        """
        if self.inversion_prompt == "empty" and self.method == "dna_edit":
            raise InputError(
                "inversion_prompt is 'empty', and the source's velocities of dna_edit are those "
                "of the inversion: invert under the source prompt"
            )

    def check_path_is_read(self) -> None:
        """Refuse a scheme that would be paid for a path the method makes no use of.

        Raises:
            InputError: says which scheme or method to take.
        """
        if self.method == "flow_edit" and self.scheme != "interpolation":
            raise InputError(
                f"the method flow_edit makes no use of an inversion (scheme {self.scheme}): give "
                "it the picture, and the scheme interpolation"
            )
        if self.scheme == "renoising" and self.method != "two_branch":
            raise InputError(
                f"the method {self.method} begins at a noise, to which the scheme renoising does "
                "not lead: take another scheme, or the method two_branch"
            )

    def check_used(self, names: Sequence[str] | dict[str, Any]) -> None:
        """Refuse settings that would have no effect.

        Raises:
            InputError: neither scheme nor method reads one of these fields.
        """
        special = {*sum(SCHEME_FIELDS.values(), ()), *sum(METHOD_FIELDS.values(), ())}
        used = {*SCHEME_FIELDS.get(self.scheme, ()), *METHOD_FIELDS[self.method]}
        for name in names:
            if name in special - used:
                raise InputError(
                    f"{name} has no effect on the scheme {self.scheme} with the method "
                    f"{self.method}: leave it out"
                )


@functools.cache
def _types() -> dict[str, Any]:
    """Of the fields."""
    return get_type_hints(Preset)


RATIOS = (
    "strength",
    "adaln_ratio",
    "attention_ratio",
    "first_site",
    "mask_threshold",
    "gamma",
    "eta",
    "eta_ratio",
)
"""Fields from 0 to 1."""
INVERSION_SETTINGS = (
    "num_inference_steps",
    "grid",
    "strength",
    "rounding",
    "scheme",
    *dict.fromkeys(field for fields in SCHEME_FIELDS.values() for field in fields),
)
"""The fields of a preset that are settled once an image has been inverted."""


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; one of: {', '.join(choices)}")
