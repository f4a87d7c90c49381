"""A diagnosis: the noise an image is inverted to, and what comes back from it.

An edit needs none of it, so it is asked for, and its network samples are counted by themselves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from rectiflow.invert.inverting import from_latents
from rectiflow.invert.presets import INVERSION_PRESET, get_preset
from rectiflow.invert.trajectory import Inversion, Reconstruction


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """How well a model takes an image to its noise and back."""

    inversion: Inversion
    """The one that was edited from; where that is no inversion, one by `INVERSION_PRESET`."""
    reconstruction: Reconstruction
    """With compensation."""
    uncompensated: Reconstruction
    """What the inversion brings back by itself."""
    nfe: int
    """Network samples of both reconstructions, and of the inversion where it was made for this."""
    seconds: float


def diagnosis_of(inversion: Inversion) -> Diagnosis:
    """Generate the image of an inversion again, with and without compensation.

    Args:
        inversion: as an edit has it. If its path does not lead to the image's noise (`renoising`,
            `interpolation`), the image is inverted first, in as many steps on the same grid.
    """
    started, spent = time.perf_counter(), 0
    if not inversion.inverted:
        preset = get_preset(
            INVERSION_PRESET,
            num_inference_steps=inversion.preset.num_inference_steps,
            grid=inversion.preset.grid,
            source_features="recompute",  # no edit will ask for them
        )
        inversion = from_latents(
            inversion.model,
            inversion.latents,
            inversion.restore,
            inversion.source_prompt,
            preset=preset,
        )
        spent = inversion.nfe
    exact, plain = inversion.reconstruct(), inversion.reconstruct(False)
    return Diagnosis(
        inversion=inversion,
        reconstruction=exact,
        uncompensated=plain,
        nfe=spent + exact.nfe + plain.nfe,
        seconds=time.perf_counter() - started,
    )
