"""Inversion: from a real image back to the noise that a flow would make it from."""

from __future__ import annotations

from rectiflow.invert.ddim import ddim_inversion, ddim_step
from rectiflow.invert.diagnosis import Diagnosis, diagnosis_of
from rectiflow.invert.euler import euler_inversion
from rectiflow.invert.fixed_point import fixed_point_inversion
from rectiflow.invert.inverting import from_latents, from_seed, invert
from rectiflow.invert.presets import PRESETS, Preset, get_preset
from rectiflow.invert.result import InversionResult
from rectiflow.invert.schemes import SCHEMES
from rectiflow.invert.trajectory import Inversion, Reconstruction

__all__ = [
    "PRESETS",
    "SCHEMES",
    "Diagnosis",
    "Inversion",
    "InversionResult",
    "Preset",
    "Reconstruction",
    "ddim_inversion",
    "ddim_step",
    "diagnosis_of",
    "euler_inversion",
    "fixed_point_inversion",
    "from_latents",
    "from_seed",
    "get_preset",
    "invert",
]
