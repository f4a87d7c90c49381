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
    "Preset",
    "get_preset",
    "method_name",
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
        reference="DirectEdit: Step-Level Accurate Inversion for Flow-Based Image Editing",
        # Its script: 30 steps, inverted at guidance 1 and edited at 2; values of all tokens, for 3
        # steps in the paper.
        scheme="query_offset",
        guidance_scale=2.0,
        compensate="none",
        adaln_ratio=0.0,
        attention_ratio=3 / 30,
        inject="all",
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
        reference="UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models",
        num_inference_steps=15,
        strength=0.6,
        scheme="uni_inv",
        method="uni_edit",
        omega=5.0,
    ),
    "flowedit": Preset(
        reference="FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models, "
        "as for Stable Diffusion 3",
        num_inference_steps=50,
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
        name = next(known, DEFAULT_PRESET)
    return name if PRESETS.get(name) == preset else f"{name}, changed"
