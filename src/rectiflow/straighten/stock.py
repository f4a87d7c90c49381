"""What stock diffusers needs to go exactly a student's way: its scheduler, and how it is called.

A folder stores a scheduler and no arguments of calls, so both are said here: the scheduler that is
written into the folder, and the arguments that the model card spells out.

A diffusion network that is used through its exact field gets DPM-Solver++ of order 1, which is
DDIM (η = 0) by another name (Lu et al. 2022, arXiv 2211.01095, section 4). diffusers' own
`DDIMScheduler` steps down by T // N timesteps whatever its list of timesteps says, so that it is
itself only where N divides T, and where the terminal SNR is zero it is not at all the field that
other solvers of diffusers integrate.
"""

from __future__ import annotations

from typing import Any

import torch

from rectiflow.models.base import FlowModel
from rectiflow.models.schedulers import rectified_scheduler
from rectiflow.models.unet import UNetModel

SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""What of a diffusion model's scheduler describes the model, and not a solver."""

SHIFTING = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)
"""Likewise of a flow's."""


def stock_scheduler(model: FlowModel) -> Any:
    """The scheduler under which the stock pipeline's N steps are Euler on `student_grid(N)`.

    Args:
        model: A student, or any model.

    Returns:
        For rectified U-Nets UniPC with flow sigmas, for diffusion U-Nets DPM-Solver++ of order 1,
        for other flows `FlowMatchEulerDiscreteScheduler` with the model's shift alone.
    """
    if isinstance(model, UNetModel):
        if model.diffusion_path is None:
            return rectified_scheduler(model.shift, model.num_train_timesteps)
        return _exact_field_scheduler(model)
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = model.pipeline.scheduler.config
    settings = {key: config[key] for key in SHIFTING if key in config}
    if model.family == "sd3":  # whose shift we take to be fixed
        settings |= {"use_dynamic_shifting": False, "shift": model.shift}
    return FlowMatchEulerDiscreteScheduler(**settings)


def stock_arguments(
    model: FlowModel, num_inference_steps: int, guidance_scale: float
) -> dict[str, Any]:
    """The arguments of the stock pipeline's call, beside the prompt.

    Args:
        model: A model whose scheduler is `stock_scheduler`'s.
        num_inference_steps: N.
        guidance_scale: α; 1 is none.
    """
    steps = num_inference_steps
    scale = int(guidance_scale) if float(guidance_scale).is_integer() else guidance_scale
    arguments: dict[str, Any] = {}
    if model.metadata.default_size is not None:
        arguments |= {"height": model.default_size, "width": model.default_size}
    arguments["num_inference_steps"] = steps
    if model.family == "sd3" and steps > 1:
        # Without them its pipeline does not space its points evenly, and ends on a tiny step.
        arguments["sigmas"] = [1 - i / steps for i in range(steps)]
    arguments["true_cfg_scale" if model.family == "qwen-image" else "guidance_scale"] = scale
    if model.metadata.max_sequence_length is not None:
        arguments["max_sequence_length"] = model.metadata.max_sequence_length
    return arguments


def _exact_field_scheduler(model: UNetModel) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    config = model.pipeline.scheduler.config
    settings = {key: config[key] for key in SCHEDULE if config.get(key) is not None}

    def build(**schedule: Any) -> Any:
        return DPMSolverMultistepScheduler(
            **schedule, solver_order=1, timestep_spacing="trailing", steps_offset=1
        )

    known = {"linear", "scaled_linear", "squaredcos_cap_v2"}
    if settings.get("beta_schedule", "linear") in known or "trained_betas" in settings:
        return build(**settings)
    # A schedule of another scheduler's own: as the table that it comes to.
    betas = torch.as_tensor(model.pipeline.scheduler.betas, dtype=torch.float64).tolist()
    kept = ("num_train_timesteps", "prediction_type", "rescale_betas_zero_snr")
    return build(trained_betas=betas, **{key: settings[key] for key in kept if key in settings})
