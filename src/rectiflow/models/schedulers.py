"""diffusers' own solvers of diffusion models: teachers and baselines that everybody knows.

Each is made from the model's own scheduler configuration, stands on diffusers' timesteps and makes
diffusers' steps; the states here are in float32 all the same, and what is told of them is told in
our time and on the straight path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.diffusion import variance_preserving
from rectiflow.flow.solver import Callback, Solution
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.identity import plain
from rectiflow.models.prompts import Conditioning
from rectiflow.models.unet import UNetModel

SCHEDULERS = {
    "dpmpp": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
}
"""DPM-Solver++ (2M; Lu et al. 2022, arXiv 2211.01095), UniPC (Zhao et al. 2023, arXiv 2302.04867)
and DDIM with η = 0 (Song et al. 2021, arXiv 2010.02502), and what diffusers calls them."""


def rectified_scheduler(flow_shift: float = 1.0, num_train_timesteps: int = 1000) -> Any:
    """The scheduler of a rectified flow in a stock pipeline of this family: Euler.

    Of diffusers' schedulers that these pipelines accept it is UniPC that can be brought to it, at
    order 1 and without its corrector, which would not be Euler beyond two steps.

    Args:
        flow_shift: As `flow.grid.shift_time` takes it.
        num_train_timesteps: T; the network is told T σ, rounded down, and at most T - 1.

    Returns:
        A `UniPCMultistepScheduler`.
    """
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        num_train_timesteps=num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=flow_shift,
        solver_order=1,
        disable_corrector=list(range(num_train_timesteps)),
        steps_offset=1,
    )


def make_scheduler(model: UNetModel, solver: str) -> Any:
    """A scheduler of diffusers, from the configuration of the model's own.

    Args:
        model: Whose.
        solver: One of `SCHEDULERS`.

    Raises:
        InputError: The solver does not know what the network predicts.
    """
    import diffusers

    if solver == "ddim" and model.prediction_type == "velocity":
        raise InputError(f"ddim does not know rectified flows such as {model.name}: use euler")
    # Latents are no pixels: what DDIM would clip by default is their outer parts. The others are of
    # order 2 whatever the model's own scheduler is: a student's makes Euler steps, by order 1.
    more = {"clip_sample": False} if solver == "ddim" else {"solver_order": 2}
    return getattr(diffusers, SCHEDULERS[solver]).from_config(
        model.pipeline.scheduler.config, **more
    )


def solver_settings(model: FlowModel, solver: str) -> dict[str, Any]:
    """What a solver of diffusers takes from the model's scheduler, in the manner of an `Identity`;
    nothing of other solvers.
    """
    if solver not in SCHEDULERS or not isinstance(model, UNetModel):
        return {}
    config = make_scheduler(model, solver).config
    return {f"solver.{name}": value for name, value in plain(config).items()}


def solve_by_scheduler(
    velocity: GuidedVelocity,
    latents: Tensor,
    solver: str,
    num_inference_steps: int,
    *,
    callback_on_step_end: Callback | None = None,
    keep_trajectory: bool = False,
) -> Solution:
    """Go from noise to data by a scheduler of diffusers.

    Args:
        velocity: The guided field of a U-Net model, whose network is asked for its own prediction.
        latents: The noise, [B, C, h, w].
        solver: One of `SCHEDULERS`.
        num_inference_steps: N.
        callback_on_step_end: As in `flow.integrate`: with the straight time and the state on the
            straight path. A state that it returns makes the solver start afresh.
        keep_trajectory: Keep every state, on the straight path.

    Raises:
        InputError: The model is no U-Net, or its network predicts what the solver does not know.
    """
    model = velocity.model
    if not isinstance(model, UNetModel):
        raise InputError(
            f"the solver {solver} is for diffusion models, and {model.name} is a flow: use euler, "
            "heun or another solver of flows"
        )
    scheduler = make_scheduler(model, solver)
    if not 1 <= num_inference_steps <= model.num_train_timesteps:
        raise InputError(
            f"num_inference_steps is {num_inference_steps}: give 1 to {model.num_train_timesteps}"
        )
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    times = _times(model, scheduler)
    x_t, nfe = latents.float(), 0
    states = [x_t * _scale(model, times[0])]
    for step, timestep in enumerate(scheduler.timesteps):
        nfe += len(x_t) * velocity.samples_per_row
        if velocity.on_step is not None:
            velocity.on_step(step)
        prediction = _guided_prediction(model, velocity, x_t, timestep)
        x_t = scheduler.step(prediction, timestep, x_t, return_dict=False)[0]
        # After the last step the state is what is decoded, whatever is left of noise in it.
        t = times[step + 1] if step + 1 < len(scheduler.timesteps) else times.new_ones(())
        x = x_t * _scale(model, t)
        if callback_on_step_end is not None:
            replacement = callback_on_step_end(step, t.float().to(x.device), x)
            if replacement is not None:
                x, x_t = replacement, replacement / _scale(model, t)
                _start_afresh(scheduler)
        if keep_trajectory:
            states.append(x)
    return Solution(x_t, torch.stack(states) if keep_trajectory else None, nfe)


@torch.no_grad()
def _guided_prediction(
    model: UNetModel, velocity: GuidedVelocity, x_t: Tensor, timestep: Tensor
) -> Tensor:
    """The network's prediction under guidance, which may as well be done here: it is linear."""
    cond = velocity.cond.rows(len(x_t))
    if velocity.negative is None:
        return model.predict(x_t, timestep, cond)
    both = Conditioning.cat([velocity.negative.rows(len(x_t)), cond])
    unguided, prompted = model.predict(torch.cat([x_t, x_t]), timestep, both).chunk(2)
    return model.combine(unguided, prompted, velocity.cfg_scale)


def _times(model: UNetModel, scheduler: Any) -> Tensor:
    """The straight times of a scheduler's states, the first included; float64."""
    path = model.diffusion_path
    if path is not None and not hasattr(scheduler, "sigmas"):
        # DDIM; where a step ends is where the next one begins, or a timestep beside it.
        return path.grid(scheduler.timesteps.cpu())
    sigmas = scheduler.sigmas.cpu().double()
    return 1 - sigmas if path is None else 1 / (1 + sigmas)  # of a diffusion model σ is b / a


def _scale(model: UNetModel, t: Tensor) -> float:
    """What brings a state of the network's path to the straight one."""
    if model.diffusion_path is None:
        return 1.0
    a, b = variance_preserving(t)
    return 1 / float(a + b)


def _start_afresh(scheduler: Any) -> None:
    """Let a multistep solver forget its last predictions, which were of another state."""
    if hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = 0
        scheduler.model_outputs = [None] * scheduler.config.solver_order
        scheduler.last_sample = None
