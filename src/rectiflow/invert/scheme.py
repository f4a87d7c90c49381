"""The interface of an inversion scheme: how to go from image to noise, and how to come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from rectiflow.flow.device import RowNumbers
from rectiflow.flow.solver import Euler, Solver, Velocity
from rectiflow.invert.presets import Preset
from rectiflow.invert.result import InversionResult


class Scheme(ABC):
    """One scheme. It has no state; what it is told is in the preset, what it finds in the result.

    To add one, subclass `Scheme` and list it in `SCHEMES`; every editing method then works with it.
    """

    name: ClassVar[str]
    accepts: ClassVar[bool] = False
    """Whether it says which of several evaluations of a step counts, by `RecordingField.accept`."""
    noisy: ClassVar[bool] = False
    """Whether it draws noise."""
    every_step: ClassVar[bool] = False
    """Whether it draws noise for every step, rather than once."""
    inverts: ClassVar[bool] = True
    """Whether the path's beginning is the image's own noise, found by the model."""

    @abstractmethod
    def invert(
        self, velocity: Velocity, x_1: Tensor, grid: Tensor, preset: Preset, noise: Tensor | None
    ) -> InversionResult:
        """Find a path that ends in an image.

        Args:
            velocity: the field of the source prompt.
            x_1: image latents ``[B, ...]``.
            grid: rising times ``[N + 1]``, the last that of the image; on the CPU.
            preset: settings.
            noise: a seeded draw from N(0, I) like `x_1`, for a noisy scheme; ``[N, B, ...]`` where
                it draws for every step.
        """

    def solver(self, path: InversionResult, grid: Tensor, rows: RowNumbers) -> Solver:
        """What generates along the path again: Euler, unless the scheme is another one's inverse.

        Args:
            path: what `invert` found for B images.
            grid: its times.
            rows: R numbers: whose path each row of the state to be integrated follows.
        """
        return Euler()
