"""Uni-Edit: go where the prompts disagree, and beyond (UniEdit-Flow, arXiv 2504.13109).

In each step both prompts are asked at the target's state. With ``Δ = v_target − v_source`` and the
map of disagreement ``M = minmax(mean_channels |Δ|)``, each sample's own,

    ``v̂ = M v_target + (1 − M) v_source + ω (1 + M) Δ``.

Where a family's pipelines pack latents into tokens (FLUX), the channels are those of a token, and
the map has one value for each patch of 2 × 2 cells. The two official codes contradict each other:
that for FLUX takes the mean of ``|Δ|``, as the paper does and as we do; that for Stable Diffusion 3
takes the minmax of the signed mean of its velocity's difference (−Δ), which is largest where the
difference points up and smallest where it points down. That is `disagreement="signed"`: another
picture. Both codes invert under the empty prompt, and edit from the source's prompt
to the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rectiflow.flow.device import take
from rectiflow.invert.preset import Disagreement, Preset
from rectiflow.models.base import FlowModel
from rectiflow.models.prompts import Conditioning
from rectiflow.steer.prompted import end_step, prompted
from rectiflow.steer.task import Edited, EditTask, StepCallback


@torch.no_grad()
def uni_edit(
    model: FlowModel,
    task: EditTask,
    preset: Preset,
    callback_on_step_end: StepCallback | None = None,
) -> Edited:
    """Run the targets from the inverted states of their sources to images.

    Two network samples per target and step, four under guidance, which both prompts are under.
    With equal prompts every ω gives what Euler generates from that state.
    """
    owners = task.owners
    both = Conditioning.cat([task.source[owners], task.target])
    field = prompted(model, both, task, preset)
    x = take(task.trajectory[0], owners)
    for step in range(task.steps):
        t, t_next = task.grid[step], task.grid[step + 1]
        v_source, v_target = field(torch.cat([x, x]), t, step).chunk(2)
        m = disagreement(
            v_target - v_source, model.patch if model.packed else 1, preset.disagreement
        )
        x = x + (t_next - t) * fused(v_source, v_target, m, preset.omega)
        x = end_step(task, step, x, take(task.trajectory[step + 1], owners), callback_on_step_end)
    return Edited(x, field.nfe, task.mask)


def fused(v_source: Tensor, v_target: Tensor, m: Tensor, omega: float) -> Tensor:
    """``v̂`` of two velocities ``[T, C, h, w]`` and the map ``[T, 1, h, w]``."""
    return m * v_target + (1 - m) * v_source + omega * (1 + m) * (v_target - v_source)


def disagreement(delta: Tensor, patch: int = 1, kind: Disagreement = "absolute") -> Tensor:
    """``M``: 0 where a sample's prompts disagree least, 1 where most; 0 all over where nowhere.

    Args:
        delta: the difference of the velocities, ``[T, C, h, w]``.
        patch: the side of the square of cells that has one value.
        kind: as `Preset.disagreement`.

    Returns:
        ``[T, 1, h, w]``.
    """
    # The signed mean is of diffusers' velocity, which points to the noise.
    size = (delta.abs() if kind == "absolute" else -delta).mean(1, keepdim=True)
    if patch > 1:
        means = torch.nn.functional.avg_pool2d(size, patch)
        size = means.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    least, most = size.amin((2, 3), keepdim=True), size.amax((2, 3), keepdim=True)
    return (size - least) / (most - least).clamp_min(torch.finfo(size.dtype).tiny)
