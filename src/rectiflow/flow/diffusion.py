"""Diffusion models are flows too: their path, and their network as a velocity field. Exactly.

Dividing the state of `x_t = a x_1 + b x_0` by a + b and measuring time by `s = a / (a + b)` makes
any such path the straight one, so a network trained to denoise can be integrated by the solvers
here with no training. Euler on the result is DDIM (Song et al. 2021, arXiv 2010.02502) with η = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.device import time_for
from rectiflow.flow.path import AffinePath, Scalar, as_tensor, convert, from_straight


def variance_preserving(s: Scalar) -> tuple[Tensor, Tensor]:
    """The (a, b) with a² + b² = 1 that lie at straight time `s = a / (a + b)`.

    Example:
        >>> [round(float(c), 3) for c in variance_preserving(3 / 7)]
        [0.6, 0.8]
    """
    s = as_tensor(s)
    length = torch.hypot(s, 1 - s)
    return s / length, (1 - s) / length


class VariancePreservingPath(AffinePath):
    """The path of a diffusion model: `a = √ᾱ`, `b = √(1 - ᾱ)`, for any table of ᾱ.

    Time t runs over the table from its noisy end (t = 0, timestep T - 1) to its clean end (t = 1,
    timestep 0). Between two entries log(ᾱ / (1 - ᾱ)) is linear, and timesteps are fractional. In
    straight time that quantity is 2 logit(s).

    Args:
        alphas_cumprod: ᾱ at timesteps 0 … T - 1, T ≥ 2: strictly falling, inside (0, 1).

    Raises:
        InputError: The table is not such a sequence.

    Example:
        >>> path = VariancePreservingPath([0.9, 0.5, 0.1])
        >>> [round(float(c), 3) for c in path.coefficients(0.5)]
        [0.707, 0.707]
        >>> path.s_min, path.s_max
        (0.25, 0.75)
        >>> float(path.timestep(0.5))
        1.0
    """

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]) -> None:
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        if table.ndim != 1 or len(table) < 2 or not bool((table.diff() < 0).all()):
            raise InputError("alphas_cumprod must be a falling list of two or more numbers")
        if not 0 < table[-1] <= table[0] < 1:
            raise InputError(
                "alphas_cumprod must lie inside (0, 1): "
                "replace a zero terminal value by 2**-24, as diffusers' Euler scheduler does"
            )
        self.log_snr = torch.logit(table)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.s_max, self.s_min = torch.sigmoid(self.log_snr[[0, -1]] / 2).tolist()
        super().__init__(
            lambda t: torch.sigmoid(self._log_snr_at_time(t)).sqrt(),
            lambda t: torch.sigmoid(-self._log_snr_at_time(t)).sqrt(),
        )

    def straight_time(self, timestep: Scalar | Sequence[float]) -> Tensor:
        """The straight time `s = a / (a + b)` of (fractional) timesteps in [0, T - 1]; float64."""
        timestep = torch.as_tensor(timestep, dtype=torch.float64)
        return torch.sigmoid(self._log_snr_at_timestep(timestep) / 2)

    def timestep(self, s: Scalar) -> Tensor:
        """The fractional timestep at straight time `s`; beyond the table, the table's end."""
        s = as_tensor(s)
        timesteps, log_snr = self._table(s)
        return _interpolate(2 * torch.logit(s), log_snr.flip(0), timesteps.flip(0))

    def grid(self, timesteps: Tensor | Sequence[float]) -> Tensor:
        """The straight-time grid of falling timesteps, ended by t = 1: one last step of x̂_1.

        Returns:
            float64, shape [len(timesteps) + 1]. Euler on it is DDIM (η = 0) at these timesteps.
        """
        s = self.straight_time(timesteps)
        return torch.cat([s, s.new_ones(1)])

    def _log_snr_at_time(self, t: Tensor) -> Tensor:
        return self._log_snr_at_timestep((1 - t) * (len(self.log_snr) - 1))

    def _log_snr_at_timestep(self, timestep: Tensor) -> Tensor:
        return _interpolate(timestep, *self._table(timestep))

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps and their log-SNR where `like` is, copied there once, not in every step."""
        place = (like.device, like.dtype)
        if place not in self._tables:
            timesteps = torch.arange(len(self.log_snr)).to(like)
            self._tables[place] = timesteps, self.log_snr.to(like)
        return self._tables[place]


@dataclass(frozen=True)
class StraightenedVelocity:
    """A diffusion network as the velocity field it defines on the straight path. Exact.

    Below the table's `s_min` the field is that of `s_min`, above `s_max` that of `s_max`: a grid
    whose last step is Euler from `s_max` to 1 ends on x̂_1 (`VariancePreservingPath.grid`).

    Args:
        predict: The network, `(x_t, timestep) -> prediction`, shapes [B, ...], [] or [B].
        path: The path it was trained on.
        prediction_type: What it predicts, as in `convert`.

    Example:
        >>> path = VariancePreservingPath([0.9, 0.5, 0.1])
        >>> v = StraightenedVelocity(lambda x_t, timestep: 0 * x_t, path, "epsilon")
        >>> v(torch.ones(1, 1), torch.tensor(0.5), 0)  # no noise in x, so E[x_1] = x / s
        tensor([[2.]])
    """

    predict: Callable[[Tensor, Tensor], Tensor]
    path: VariancePreservingPath
    prediction_type: str = "epsilon"

    @property
    def samples_per_row(self) -> int:
        """Samples through the network for one row of the state (2 under guidance)."""
        return getattr(self.predict, "samples_per_row", 1)

    def __call__(self, x: Tensor, t: Tensor, step: int = 0) -> Tensor:
        """`E[x_1 | x] - E[x_0 | x]` at straight time `t`."""
        s = t.clamp(self.path.s_min, self.path.s_max)
        a, b = variance_preserving(s)
        x_t = from_straight(x, a, b)
        value = self.predict(x_t, time_for(self.path.timestep(s), x, x.dtype))
        return convert(value, x_t, a, b, source=self.prediction_type, target="velocity")


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), knots rising, constant beyond them."""
    # clamp() and an index of no dimension would fetch their numbers from the device, and wait.
    x = torch.minimum(torch.maximum(x, knots[0]), knots[-1])
    right = torch.searchsorted(knots, x.detach().contiguous(), right=True)
    i = right.clamp(1, len(knots) - 1) - 1
    left = knots.take(i)
    weight = (x - left) / (knots.take(i + 1) - left)
    return torch.lerp(values.take(i), values.take(i + 1), weight)
