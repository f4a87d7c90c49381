"""The presets: the project's own, the paper's, and one per peer with its published settings."""

from __future__ import annotations

from typing import Any

from rectiflow.errors import InputError
from rectiflow.invert.preset import INVERSION_SETTINGS, Compensate, Feature, Inject, Preset

__all__ = [
    "DEFAULT_PRESET",
    "INVERSION_PRESET",
    "INVERSION_SETTINGS",
    "PRESETS",
    "Compensate",
    "Feature",
    "Inject",
    "TWINS",
    "Preset",
    "get_preset",
    "method_name",
    "on_family",
]

FTEDIT = "Unveil Inversion and Invariance in Flow Transformer for Versatile Image Editing (FTEdit)"

DEFAULT_PRESET = "fast"
"""Of an edit: the best measured, and nothing is paid that it does not use."""
INVERSION_PRESET = "exact"
"""Of an inversion by itself, where the noise of the image is what is asked for."""

PRESETS: dict[str, Preset] = {
    # Settings of both chosen on the tuning seeds (docs/editing.md).
    "fast": Preset(
        reference=f"{FTEDIT}, on paths renoised as in FlowEdit",
        scheme="renoising",
        source_features="inversion",
        compensate="both",
        adaln_ratio=0.07,
        attention_ratio=0.2,
    ),
    "exact": Preset(
        reference=f"{FTEDIT}, its controls after DirectEdit's inversion, without compensation",
        scheme="query_offset",
        time="cleaner",
        source_features="inversion",
        compensate="none",
        adaln_ratio=0.07,
        attention_ratio=0.3,
        features=("key", "value"),
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
    "ddim": Preset(
        reference="Denoising Diffusion Implicit Models (DDIM): their inversion, and the target "
        "prompt, nothing else",
        num_inference_steps=50,
        grid="student",
        scheme="ddim",
        compensate="none",
        adaln_ratio=0.0,
        attention_ratio=0.0,
    ),
    "directedit": Preset(
        reference="DirectEdit: Step-Level Accurate Inversion for Flow-Based Image Editing, "
        "as for Stable Diffusion 3.5 medium",
        # Its README, for Stable Diffusion 3.5 medium: 30 steps, inverted at guidance 1 and edited
        # at 2, values of all tokens. Its code: of every attention, and at the noisier time.
        grid="diffusers",
        scheme="query_offset",
        guidance_scale=2.0,
        compensate="none",
        adaln_ratio=0.0,
        attention_ratio=0.3,
        inject="all",
        last_block=True,
        source_features="inversion",
    ),
    "directedit-flux": Preset(
        reference="DirectEdit: Step-Level Accurate Inversion for Flow-Based Image Editing, "
        "as for FLUX",
        # As above; of the single blocks, before which there are 19 of 57 attentions.
        grid="diffusers",
        scheme="query_offset",
        guidance_scale=2.0,
        compensate="none",
        adaln_ratio=0.0,
        attention_ratio=0.15,
        inject="all",
        first_site=19 / 57,
        source_features="inversion",
    ),
    "two-step": Preset(
        reference="A time-symmetric two-step inversion, and FTEdit's controls",
        scheme="two_step",
        compensate="none",
        adaln_ratio=0.07,
        attention_ratio=0.35,
        source_features="inversion",
    ),
    "rf-solver": Preset(
        reference="Taming Rectified Flow for Inversion and Editing (RF-Solver, RF-Edit)",
        # Its README: 30 steps at guidance 2, of which 2 to 8 share. Its code: the last 18 single
        # blocks of FLUX, before which there are 39 of 57 attentions.
        scheme="midpoint",
        guidance_scale=2.0,
        compensate="none",
        adaln_ratio=0.0,
        attention_ratio=5 / 30,
        inject="all",
        first_site=39 / 57,
        source_features="inversion",
    ),
    "fireflow": Preset(
        reference="FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing",
        # Its README: 8 steps at guidance 2, of which the first shares. Its code: the single blocks
        # of FLUX, before which there are 19 of 57 attentions.
        num_inference_steps=8,
        scheme="fireflow",
        guidance_scale=2.0,
        compensate="none",
        adaln_ratio=0.0,
        attention_ratio=1 / 8,
        inject="all",
        first_site=19 / 57,
        source_features="inversion",
    ),
    "rf-inversion": Preset(
        reference="Semantic Image Inversion and Editing using Rectified Stochastic Differential "
        "Equations (RF-Inversion)",
        num_inference_steps=28,
        scheme="rf_inversion",
        inversion_prompt="empty",
        gamma=0.5,
        method="rf_inversion",
        guidance_scale=3.5,
        eta=0.9,
        eta_ratio=0.25,
    ),
    "uniedit": Preset(
        reference="UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models, "
        "as for Stable Diffusion 3",
        num_inference_steps=15,
        grid="diffusers",
        strength=0.6,
        scheme="uni_inv",
        inversion_prompt="empty",
        method="uni_edit",
        omega=5.0,
    ),
    "uniedit-flux": Preset(
        reference="UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models, "
        "as for FLUX",
        num_inference_steps=15,
        strength=0.6,
        rounding="nearest",
        scheme="uni_inv",
        inversion_prompt="empty",
        method="uni_edit",
        omega=5.0,
    ),
    "flowedit": Preset(
        reference="FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models, "
        "as for Stable Diffusion 3",
        num_inference_steps=50,
        grid="diffusers",
        strength=33 / 50,
        scheme="interpolation",
        method="flow_edit",
        source_guidance_scale=3.5,
        guidance_scale=13.5,
    ),
    "flowedit-flux": Preset(
        reference="FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models, "
        "as for FLUX",
        num_inference_steps=28,
        strength=24 / 28,
        scheme="interpolation",
        method="flow_edit",
        source_guidance_scale=1.5,
        guidance_scale=5.5,
    ),
    "dnaedit": Preset(
        reference="DNAEdit: Direct Noise Alignment for Text-Guided Rectified Flow Editing, "
        "as for Stable Diffusion 3.5 medium",
        num_inference_steps=40,
        grid="diffusers",
        strength=27 / 40,
        scheme="dna",
        method="dna_edit",
        guidance_scale=3.5,
        eta=0.8,
    ),
    "dnaedit-flux": Preset(
        reference="DNAEdit: Direct Noise Alignment for Text-Guided Rectified Flow Editing, "
        "as for FLUX",
        num_inference_steps=28,
        strength=24 / 28,
        scheme="dna",
        method="dna_edit",
        guidance_scale=2.5,
        eta=0.8,
    ),
    "sdedit": Preset(
        reference="SDEdit: Guided Image Synthesis and Editing with Stochastic Differential "
        "Equations, on a flow",
        strength=0.75,
        scheme="interpolation",
        compensate="none",
        adaln_ratio=0.0,
        attention_ratio=0.0,
    ),
    # Not for pictures: two generations from one noise, at the model's own guidance
    # (rectiflow.consistent).
    "subject": Preset(
        reference="FTEdit's controls between generated pictures, for one subject in all of them",
        scheme="euler",
        compensate="none",
        adaln_ratio=0.07,
        attention_ratio=0.3,
    ),
}

TWINS: dict[str, dict[str, str]] = {
    name: {"flux": f"{name}-flux"} for name in ("directedit", "uniedit", "flowedit", "dnaedit")
}
"""Presets of methods that were published for several families: which one a name stands for on a
family (`FlowModel.family`) other than its own."""


def on_family(name: str, family: str) -> str:
    """The preset that a name stands for on a family of models.

    Example:
        >>> on_family("flowedit", "flux"), on_family("flowedit", "sd3")
        ('flowedit-flux', 'flowedit')
    """
    return TWINS.get(name, {}).get(family, name)


def get_preset(preset: str | Preset, family: str | None = None, **settings: Any) -> Preset:
    """A preset by name, with some of its fields replaced.

    Args:
        preset: its name; a `Preset` is taken as it is.
        family: of the model; where the method was published for it too, a name stands for those
            settings (`TWINS`).
        **settings: fields to replace.

    Raises:
        InputError: there is no such preset or field, or a value is out of range or of no effect.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InputError(f"preset is {preset!r}; one of: {', '.join(PRESETS)}")
        preset = PRESETS[preset if family is None else on_family(preset, family)]
    return preset.override(settings)


def method_name(preset: Preset, name: str | None = None) -> str:
    """What a preset is called, marked where fields were replaced.

    Args:
        preset: as it was used.
        name: the name it was asked for by, which may stand for another on the model's family;
            found by its reference when None.
    """
    if name is None or name in TWINS:
        known = (n for n, other in PRESETS.items() if other.reference == preset.reference)
        name = next(known, DEFAULT_PRESET)
    return name if PRESETS.get(name) == preset else f"{name}, changed"
