"""DDIM inversion: Song et al.'s deterministic step run backwards (2010.02502, section 4.3).

In a diffusion model's coordinates, ``x̃ = x_t/√ᾱ`` and ``σ = √((1 − ᾱ)/ᾱ)``, the step from the
cleaner σ_{i+1} to the noisier σ_i is ``x̃_i = x̃_{i+1} + (σ_i − σ_{i+1}) ε̂``. On the straight path
``x̃ = x/t`` and ``σ = (1 − t)/t``, so it is a mixture of the state and the noise seen in it:
``x_i = (t_i/t_{i+1}) x_{i+1} + (1 − t_i/t_{i+1}) ε̂``.

On the grid ``"leading"`` it is diffusers' `DDIMInverseScheduler` as the model's folder has it
(``steps_offset``, ``set_alpha_to_one``), step for step, for every number of steps and prediction
type. On ``"student"`` it is that scheduler at ``timestep_spacing="trailing"`` where N divides T;
where it does not, the official steps do not begin where the one before has ended, and ours do.
Latents are not clipped (``clip_sample``).
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from rectiflow.flow.diffusion import variance_preserving
from rectiflow.flow.solver import Velocity
from rectiflow.invert.presets import Preset
from rectiflow.invert.result import InversionResult
from rectiflow.invert.scheme import Scheme
from rectiflow.models.base import FlowModel

BEGINNING = 1e-4
"""Before this time a state is its noise. The schedulers of rectified flows begin at t = 1e-6, and
diffusion models without a terminal signal at 2.4e-4."""


def ddim_inversion(
    velocity: Velocity,
    x_1: Tensor,
    grid: Tensor,
    *,
    time: Literal["noisier", "cleaner"] = "noisier",
    prediction_type: str = "epsilon",
    image_time: float = 1.0,
) -> InversionResult:
    """`ddim_step` after step from the image, one evaluation each.

    Args:
        velocity: the field.
        x_1: image latents, ``[B, ...]``, float32 or float64.
        grid: rising times ``[N + 1]``, the last that of the image.
        time: as `ddim_step` takes it.
        prediction_type: likewise.
        image_time: the time of the state that the image is taken for, if the grid ends at 1.

    Returns:
        The trajectory; no residuals are known, they are NaN.
    """
    states = [x_1]
    for step in reversed(range(len(grid) - 1)):
        t, t_next, x = grid[step], grid[step + 1], states[-1]
        if t_next == 1 and image_time < 1:
            t_next = grid.new_tensor(image_time)
            x = x * _length(t_next).to(x.dtype)
        states.append(
            ddim_step(velocity, x, t, t_next, step, time=time, prediction_type=prediction_type)
        )
    return InversionResult.unsolved(states)


def ddim_step(
    velocity: Velocity,
    x_next: Tensor,
    t: Tensor,
    t_next: Tensor,
    step: int,
    *,
    time: Literal["noisier", "cleaner"] = "noisier",
    prediction_type: str = "epsilon",
) -> Tensor:
    """The state at `t` by the noise seen in the state at `t_next`, its neighbour.

    With ``time="cleaner"`` it is Euler's step with the velocity there, exactly. With `"noisier"` it
    is not: what stays as it is while the time is changed is the state of the diffusion model,
    ``√ᾱ x_1 + √(1 − ᾱ) x_0``, and not that of the straight path; and so does what the network
    predicts there, which is taken for a prediction at the state's own time.

    Args:
        velocity: the field.
        x_next: the state at `t_next`, ``[B, ...]``.
        t: where the step leads.
        t_next: where it begins, not below `t`.
        step: its number, for the velocity.
        time: what the network is told: the time of where the step leads (`"noisier"`, as diffusers'
            `DDIMInverseScheduler` and most scripts have it) or that of the state (`"cleaner"`).
            Never 0 (before `BEGINNING`), where the state itself is taken for the noise that is
            looked for, nor 1, of which a diffusion model has no timestep, unless there is nothing
            else.
        prediction_type: of the network, `FlowModel.prediction_type`: what of its answer is kept
            where the time is changed. That of a flow is taken for noise.
    """
    told = t if t > BEGINNING and (time == "noisier" or t_next == 1) else t_next
    # The network's own state, of unit variance, is the same whatever time it is told.
    asked = x_next * (_length(told) / _length(t_next)).to(x_next.dtype)
    v = velocity(asked, told, step)
    noise, image = asked - told * v, asked + (1 - told) * v  # E[x_0 | x] and E[x_1 | x] as told
    a, b = variance_preserving(t_next.double())
    if prediction_type == "v_prediction":
        a_told, b_told = variance_preserving(told.double())
        predicted = a_told.to(v.dtype) * noise - b_told.to(v.dtype) * image
        noise = a.to(v.dtype) * predicted + (b / _length(t_next)).to(v.dtype) * x_next
    elif prediction_type == "sample" and b > 0:  # in an image there is no noise to be seen
        noise = (x_next - t_next * image) / (1 - t_next)
    ratio = t / t_next
    return ratio * x_next + (1 - ratio) * noise


def _length(t: Tensor) -> Tensor:
    """``x / x_t = 1 / (√ᾱ + √(1 − ᾱ))`` at straight time t, which is ``√(t² + (1 − t)²)``."""
    return torch.hypot(t.double(), 1 - t.double())


@runtime_checkable
class OfANetwork(Protocol):
    """A field that says whose it is."""

    @property
    def model(self) -> FlowModel:
        """Whose."""
        ...


class DDIMInversion(Scheme):
    """`ddim_inversion`, generated by Euler's step, which is DDIM's."""

    name = "ddim"

    def invert(
        self, velocity: Velocity, x_1: Tensor, grid: Tensor, preset: Preset, noise: Tensor | None
    ) -> InversionResult:
        """Run DDIM backwards."""
        if not isinstance(velocity, OfANetwork):
            return ddim_inversion(velocity, x_1, grid, time=preset.time)
        model = velocity.model
        return ddim_inversion(
            velocity,
            x_1,
            grid,
            time=preset.time,
            prediction_type=model.prediction_type,
            image_time=model.image_time if preset.grid == "leading" else 1.0,
        )
