"""What is looked at while a student is trained: straightness, transport cost, one-step error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rectiflow.flow.grid import uniform
from rectiflow.flow.measure import straightness, transport_cost
from rectiflow.flow.solver import Velocity, integrate
from rectiflow.models.base import FlowModel
from rectiflow.models.prompts import Conditioning
from rectiflow.straighten.coupling import Piece

TEXT = 48
"""Letters of a prompt under its picture."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Held-out samples of a coupling, the same each time.

    Args:
        piece: Noise, latents and prompts.
        cond: The prompts, embedded, with their guidance scale if the network is told one.
        num_inference_steps: Of the accurate solution, by the midpoint rule; 20 or more.
        student_steps: For how many Euler steps the student is meant to be good.
        paired: Whether x_1 is where the noise should go; of flow matching it is not.
        batch_size: Rows through the network at a time.
    """

    piece: Piece
    cond: Conditioning
    num_inference_steps: int = 20
    student_steps: tuple[int, ...] = (1,)
    paired: bool = True
    batch_size: int = 16

    def chunks(self) -> list[slice]:
        """The rows, `batch_size` at a time."""
        count = len(self.piece.x_0)
        return [slice(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size)]


@torch.no_grad()
def measure(model: FlowModel, probe: Probe) -> dict[str, float]:
    """Measure a student on held-out samples; everything is per dimension of a latent.

    Returns:
        `straightness`: S(Z) of the student's own flow, with `straightness_error`, its standard
        error; `transport_cost`: the mean square of its displacement; and for each number of steps
        k, `k_step_error`: the mean square of k Euler steps against the student's accurate solution.
        Where the samples are pairs also `k_step_pair_error`, against the pair's x_1, and
        `pair_error`, the accurate solution against it.

    Source: Liu et al. 2023, arXiv 2309.06380, sections 2 and 4.
    """
    rows: dict[str, list[Tensor]] = {}
    for chunk in probe.chunks():
        x_0 = probe.piece.x_0[chunk].to(model.device)
        x_1 = probe.piece.x_1[chunk].to(model.device)
        cond = on_device(probe.cond[chunk], model.device)
        field = conditional(model, cond)
        grid = accurate_grid(model, probe.num_inference_steps)
        solved = integrate(field, model.initial_state(x_0), grid, "midpoint", keep_trajectory=True)
        assert solved.trajectory is not None
        found = {
            "straightness": straightness(solved.trajectory, grid, field).samples,
            "transport_cost": transport_cost(x_0, solved.x).samples,
        }
        if probe.paired:
            found["pair_error"] = mean_square(solved.x - x_1)
        for k in probe.student_steps:
            end = few_steps(model, cond, x_0, k)
            found[f"{k}_step_error"] = mean_square(end - solved.x)
            if probe.paired:
                found[f"{k}_step_pair_error"] = mean_square(end - x_1)
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    whole = {name: torch.cat(values) for name, values in rows.items()}
    result = {name: float(values.mean()) for name, values in whole.items()}
    s = whole["straightness"]
    if len(s) > 1:
        result["straightness_error"] = float(s.std() / len(s) ** 0.5)
    return result


def few_steps(
    model: FlowModel, cond: Conditioning, x_0: Tensor, num_inference_steps: int
) -> Tensor:
    """Where k Euler steps on the student's own grid lead: [B, C, h, w], in float32."""
    grid = model.student_grid(num_inference_steps)
    return integrate(conditional(model, cond), model.initial_state(x_0), grid).x


def conditional(model: FlowModel, cond: Conditioning) -> Velocity:
    """The student's own field: without guidance, but told the scale that `cond` may have."""
    return lambda x, t, step: model.velocity(x, t, cond)


def accurate_grid(model: FlowModel, num_inference_steps: int) -> Tensor:
    """Even steps from the field's first time to 1, with its last time among them; float64."""
    low, high = model.t_min, model.t_max
    points = low + (1 - low) * uniform(num_inference_steps)
    # Above t_max the field goes straight on: a point there is where it has its bend.
    if low < high < 1 and not bool(torch.isclose(points, points.new_tensor(high)).any()):
        points = torch.cat(
            [points[points < high], points.new_tensor([high]), points[points > high]]
        )
    return points


def told(model: FlowModel, cond: Conditioning, guidance: Tensor | None) -> Conditioning:
    """Prompts with a guidance scale per row [B], for networks that take it as an input."""
    if not model.guidance_embeds or guidance is None:
        return cond
    return dataclasses.replace(cond, guidance=guidance.to(cond.embeds.device, torch.float32))


def on_device(cond: Conditioning, device: torch.device) -> Conditioning:
    """The same on another device."""
    parts = {field.name: getattr(cond, field.name) for field in dataclasses.fields(cond)}
    there = {name: part.to(device) for name, part in parts.items() if part is not None}
    return dataclasses.replace(cond, **there)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, and afterwards in the mode it was in."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)


def mean_square(z: Tensor) -> Tensor:
    """`‖z‖² / d` of each row, float64 [B] on the CPU."""
    return z.cpu().double().flatten(1).square().mean(1)


@torch.no_grad()
def draw_sheet(model: FlowModel, probe: Probe, path: Path, most: int = 8) -> None:
    """Write a contact sheet: a row of pictures for every number of steps, one column per sample.

    From above: the student in each of its numbers of steps, the student solved accurately, and the
    pair's own picture (where the samples are pairs).

    Args:
        model: The student.
        probe: What is drawn.
        path: Of the PNG.
        most: Columns.
    """
    from rectiflow.report.sheet import contact_sheet

    rows = slice(0, min(most, len(probe.piece.x_0)))
    x_0 = probe.piece.x_0[rows].to(model.device)
    cond = on_device(probe.cond[rows], model.device)
    grid = accurate_grid(model, probe.num_inference_steps)
    latents: list[tuple[str, Tensor]] = [
        (f"{k} step{'s' * (k > 1)}", few_steps(model, cond, x_0, k)) for k in probe.student_steps
    ]
    field = conditional(model, cond)
    solved = integrate(field, model.initial_state(x_0), grid, "midpoint").x
    latents.append((f"{len(grid) - 1} midpoint", solved))
    if probe.paired:
        latents.append(("pair", probe.piece.x_1[rows].to(model.device)))
    pictures: list[Tensor] = []
    words: list[str] = []
    for name, part in latents:
        pictures += list(model.decode(part).permute(0, 2, 3, 1).cpu())
        words += [f"{name}: {text}"[:TEXT] for text in probe.piece.prompts[rows]]
    sheet = contact_sheet(
        [picture.numpy() for picture in pictures],
        columns=len(x_0),
        scale=max(1, 128 // pictures[0].shape[0]),
        captions=words,
    )
    sheet.save(path)


def names(student_steps: Sequence[int]) -> list[str]:
    """What `measure` reports of pairs, in the order of interest."""
    of_steps = [f"{k}_step_{kind}" for k in student_steps for kind in ("pair_error", "error")]
    return ["straightness", "straightness_error", "transport_cost", *of_steps, "pair_error"]
