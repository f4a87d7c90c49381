"""Whether a model knows an image: what its inversion looks like beside those of images it knows.

Two things tell, and both are free once the image has been inverted. A true inversion ends at a
noise, which is like a draw from N(0, I) if the model could have generated the image. A renoised
path ends at a noise that was drawn, and says nothing by it; but the model was asked there what it
would make of the image under noise, and how wrong it is, is the loss it was trained with.

What is usual differs from model to model, from scheme to scheme and with the number of steps: a
crude inversion ends at a noise that is too small. `Metadata.domain` holds the ranges of one model;
where it is empty, `GENERAL` holds for noise, and nothing else is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rectiflow.flow.measure import noise_statistics
from rectiflow.invert.result import InversionResult
from rectiflow.invert.scheme import Scheme
from rectiflow.invert.schemes import SCHEMES
from rectiflow.invert.trajectory import Inversion
from rectiflow.models.metadata import Metadata

Ranges = dict[str, tuple[float, float]]
"""From and to, by the name of a statistic."""

GENERAL: Ranges = {"norm": (0.75, 1.25), "autocorrelation": (-0.25, 0.25)}
"""Far from N(0, I) by any model's measure."""


WORDS = {
    "norm": "the noise found is unlike N(0, I), its norm is",
    "kurtosis": "the noise found is unlike N(0, I), its excess kurtosis is",
    "autocorrelation": "the noise found is unlike N(0, I), its neighbours correlate by",
    "denoising_error": "under fresh noise the model errs about it by",
}
"""What a statistic's value is said with."""


@dataclass(frozen=True)
class Finding:
    """A statistic of an image outside what is usual."""

    name: str
    """One of `WORDS`."""
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """What was seen, and what is usual."""
        return f"{WORDS[self.name]} {self.value:.2f} (usual: {self.low:.2f} to {self.high:.2f})"


def denoising_error(path: InversionResult, grid: Tensor) -> Tensor:
    """How wrong the model is about images under noise, along a renoised path.

    ``mean over i of ‖v_i − (x_1 − ε_i)‖² / d`` with ``ε_i = (x_i − t_i x_1) / (1 − t_i)``: an
    estimate of the flow-matching loss (arXiv 2209.03003, equation 1) of each image under its
    prompt.

    Args:
        path: as the scheme ``renoising`` finds it, with velocities.
        grid: its times ``[N + 1]``.

    Returns:
        float64 ``[B]``.
    """
    assert path.velocities is not None
    states = path.trajectory.cpu().double()  # where there is float64
    left = (1 - grid[:-1].double()).reshape(-1, *[1] * (states.ndim - 1))
    away = path.velocities.cpu().double() - (states[-1] - states[:-1]) / left
    return away.square().flatten(2).mean((0, 2))


def path_statistics(scheme: Scheme, path: InversionResult, grid: Tensor) -> list[dict[str, float]]:
    """What a whole path, from noise to image, tells of each of its images.

    Args:
        scheme: what found it.
        path: of B images.
        grid: its times.

    Returns:
        B times statistics by name; empty where the scheme tells nothing, as of a path that was
        drawn to a noise instead of finding one.
    """
    if scheme.inverts and not scheme.noisy:
        unit = path.trajectory[0] / torch.hypot(grid[0], 1 - grid[0])  # 1 but for diffusion models
        rows = [noise_statistics(noise[None]) for noise in unit]
        return [
            {
                "norm": row.norm,
                "kurtosis": row.kurtosis,
                "autocorrelation": row.autocorrelation,
            }
            for row in rows
        ]
    if scheme.every_step and path.velocities is not None:
        return [{"denoising_error": error} for error in denoising_error(path, grid).tolist()]
    return [{} for _ in path.trajectory[0]]


def usual(metadata: Metadata, scheme: str, num_inference_steps: int) -> Ranges:
    """What is usual of images that a model knows, inverted by a scheme in so many steps.

    Between two numbers of steps that were measured it is interpolated in their logarithm, beyond
    them it is that of the nearest. Of a scheme that was not measured nothing is known.

    Example:
        >>> known = Metadata(domain={"euler": {"norm": {5: (0.0, 0.7), 20: (0.2, 0.9)}}})
        >>> usual(known, "euler", 10)
        {'norm': (0.1, 0.8)}
        >>> usual(known, "euler", 50), usual(known, "two_step", 5)
        ({'norm': (0.2, 0.9)}, {})
        >>> usual(Metadata(), "euler", 10) == GENERAL
        True
    """
    if metadata.domain is None:
        return GENERAL
    found: Ranges = {}
    for name, measured in metadata.domain.get(scheme, {}).items():
        steps = sorted(measured)
        ends = np.array([measured[count] for count in steps])
        at = np.log(num_inference_steps)
        low, high = (float(np.interp(at, np.log(steps), column)) for column in ends.T)
        found[name] = (low, high)
    return found


def unusual(statistics: Mapping[str, float], ranges: Ranges) -> list[Finding]:
    """The statistics outside their ranges; one that has no range is not judged.

    Example:
        >>> [str(found) for found in unusual({"norm": 1.5, "kurtosis": 9.0}, GENERAL)]
        ['the noise found is unlike N(0, I), its norm is 1.50 (usual: 0.75 to 1.25)']
    """
    return [
        Finding(name, value, *ranges[name])
        for name, value in statistics.items()
        # A constant noise has neither kurtosis nor neighbours: NaN lies in no range.
        if name in ranges and not ranges[name][0] <= value <= ranges[name][1]
    ]


def findings(inversion: Inversion) -> list[Finding]:
    """What speaks against the model's knowing an image; nothing for most images it knows.

    Never anything of an image that the model itself generated, nor of a path that does not go back
    to the noise (``strength`` below 1).
    """
    if inversion.seed is not None or inversion.preset.strength < 1:
        return []
    scheme = SCHEMES[inversion.preset.scheme]
    (statistics,) = path_statistics(scheme, inversion.path, inversion.grid)
    return unusual(statistics, usual_of(inversion))


def usual_of(inversion: Inversion) -> Ranges:
    """What is usual of images that its model knows, inverted as this one was."""
    steps = inversion.preset.num_inference_steps
    return usual(inversion.model.metadata, inversion.preset.scheme, steps)
