"""How straight a model's flow is and how far it carries: on its own trajectories from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.evaluate.emoji_models import mean_interval
from rectiflow.flow.measure import COSTS, curvature, straightness, transport_cost
from rectiflow.flow.solver import Solver, integrate
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import initial_noise
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.straighten.monitor import accurate_grid
from rectiflow.straighten.text_cache import remembering_prompts

Column = NDArray[np.float64]
"""A figure of every sample, [N]."""


def flow_samples(
    model: FlowModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 20,
    solver: Solver | str = "midpoint",
    guidance_scale: float = 1.0,
    batch_size: int = 50,
) -> dict[str, Column]:
    """How straight a model's flow is, and what it costs to move noise along it, per dimension.

    All of the guided field: under guidance α it is `v_α` whose trajectories are followed and whose
    velocity stands in S(Z). Of a diffusion model the field begins at `t_min` and so do S and
    curvature; costs are between the noise itself and the data.

    Args:
        model: The field.
        prompts: N of them.
        seeds: Of the noise, one each.
        num_inference_steps: Even steps of the accurate solution.
        solver: Of the accurate solution.
        guidance_scale: α, or the input of a network that takes the guidance as one.
        batch_size: Rows through the network at a time, twice as many under guidance.

    Returns:
        `"straightness"`, `"curvature"` and the names of `flow.measure.COSTS`, float64 [N] each,
        in the order of the prompts. The same seeds and prompts of two models make pairs.
        `flow.measure` has their equations.

    Raises:
        InputError: There is not one seed for each prompt, or fewer than two steps.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each")
    grid = accurate_grid(model, num_inference_steps)
    rows: dict[str, list[Tensor]] = {}
    with remembering_prompts(model):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            x_0 = initial_noise(model, seeds[part], model.default_size, model.default_size)
            cond = model.encode_prompt(prompts[part])
            field = GuidedVelocity(model, cond, guidance_scale=guidance_scale)
            z_0 = model.initial_state(x_0)
            solved = integrate(field, z_0, grid, solver, keep_trajectory=True)
            assert solved.trajectory is not None
            found = {
                "straightness": straightness(solved.trajectory, grid, field),
                "curvature": curvature(solved.trajectory, grid),
                **{cost: transport_cost(x_0, solved.x, cost) for cost in COSTS},
            }
            for name, estimate in found.items():
                rows.setdefault(name, []).append(estimate.samples.cpu())
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}


def described(values: ArrayLike) -> dict[str, Any]:
    """The mean of independent samples with its standard error and 95 % interval.

    Example:
        >>> described([1.0, 3.0])
        {'mean': 2.0, 'standard_error': 1.0, 'interval': [0.04, 3.96]}
    """
    column = np.asarray(values, np.float64)
    low, high = mean_interval(column.tolist())
    return {
        "mean": float(column.mean()),
        "standard_error": (high - low) / (2 * 1.96),
        "interval": [low, high],
    }
