"""How wrong an inversion step is that uses the velocity it knows for the one it looks for.

The step from x_i to x_{i+1} has its velocity at x_i. An inversion comes from x_{i+1} and asks
there, telling the network either the step's own time t_i (``"noisier"``) or the time of the state,
t_{i+1} (``"cleaner"``). On the flow's own path through an image its error, relative to what the
step moves, is

- in the straight path's coordinates (Euler's inversion)
  ``‖v(x_{i+1}, t) − v(x_i, t_i)‖ / ‖v(x_i, t_i)‖``,
- in a diffusion model's (DDIM's), where a step moves ``x̃ = x_t/√ᾱ`` by ``Δσ ε̂``,
  ``‖ε̂(x̄_{i+1}, t) − ε̂(x̄_i, t_i)‖ / ‖ε̂(x̄_i, t_i)‖``, with x̄ the state scaled to unit variance.

One flow has either, as a flow and a diffusion model are the same but for the scale of states
(`flow.diffusion`); the ratio depends on the coordinates. What does not is the round trip: how far
from an image its N steps back and N steps forth end.

FTEdit (arXiv 2411.15843, section 3.2) says that rectified flows suffer more than DDIM does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.evaluate.edit_scores import interval, pictures
from rectiflow.evaluate.emoji_edits import REPORTED_SEED
from rectiflow.evaluate.inversion_claims import Rows, compared, sentence
from rectiflow.flow.grid import RESOLUTION
from rectiflow.flow.solver import Velocity, integrate
from rectiflow.invert.ddim import BEGINNING, ddim_inversion
from rectiflow.invert.euler import euler_inversion
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity

STEPS = (10, 25, 50)
LIMIT = 8
REFERENCE_STEPS = 100
BATCH = 16

COORDINATES = ("straight", "diffusion")
TIMES: tuple[Literal["noisier", "cleaner"], ...] = ("noisier", "cleaner")


def accurate_states(
    velocity: Velocity, x_1: Tensor, grid: Tensor, steps: int = REFERENCE_STEPS, bend: float = 1.0
) -> Tensor:
    """The flow's own path through images, at the times of a grid.

    By the midpoint rule, backwards, over the grid's times and `steps` even ones among them.

    Args:
        velocity: the field.
        x_1: images' latents ``[B, ...]``.
        grid: rising times ``[N + 1]``, the last 1.
        steps: of the accurate solution.
        bend: a time at which the field is not smooth, `FlowModel.t_max`.

    Returns:
        ``[N + 1, B, ...]``, from the noise on.
    """
    grid = grid.double().cpu()
    more = torch.linspace(float(grid[0]), 1, steps + 1, dtype=torch.float64)
    more = torch.cat([more, more.new_tensor([bend])])
    apart = (more[:, None] - grid).abs().amin(1) > RESOLUTION
    every = torch.cat([grid, more[apart]]).unique()
    solved = integrate(velocity, x_1, every.flip(0), "midpoint", keep_trajectory=True)
    assert solved.trajectory is not None
    return solved.trajectory.flip(0)[torch.searchsorted(every, grid)]


def approximation_errors(velocity: Velocity, states: Tensor, grid: Tensor) -> dict[str, Tensor]:
    """The errors above, of every step and image.

    Args:
        velocity: the field; 3 N + 1 evaluations.
        states: of the flow's own path, ``[N + 1, B, ...]``.
        grid: their rising times ``[N + 1]``.

    Returns:
        float64 ``[N, B]`` by ``"COORDINATES, TIME"``. NaN in a diffusion model's coordinates for a
        step to t = 0, where σ is infinite. From t = 1, of which a diffusion model has no timestep,
        DDIM tells the noisier time whichever it is to tell.
    """
    last = len(grid) - 2
    found: dict[str, list[Tensor]] = {f"{c}, {t}": [] for c in COORDINATES for t in TIMES}
    v_next = velocity(states[-1], grid[-1], last)
    for step in range(last, -1, -1):
        (t, t_next), (x, x_next) = grid[step : step + 2], states[step : step + 2]
        v = velocity(x, t, step)
        found["straight, noisier"].append(_relative(velocity(x_next, t, step), v))
        found["straight, cleaner"].append(_relative(v_next, v))
        noise = x - t * v
        asked = x_next * (torch.hypot(t, 1 - t) / torch.hypot(t_next, 1 - t_next))
        told_t = _relative(asked - t * velocity(asked, t, step), noise)
        own = _relative(x_next - t_next * v_next, noise) if t_next < 1 else told_t
        nowhere = t < BEGINNING
        found["diffusion, noisier"].append(told_t.masked_fill(nowhere, torch.nan))
        found["diffusion, cleaner"].append(own.masked_fill(nowhere, torch.nan))
        v_next = v
    return {name: torch.stack(steps[::-1]).cpu() for name, steps in found.items()}


def round_trips(velocity: Velocity, x_1: Tensor, grid: Tensor) -> dict[str, Tensor]:
    """``‖x̂_1 − x_1‖ / ‖x_1‖`` after an inversion and Euler's (hence DDIM's) steps forth.

    Returns:
        float64 ``[B]`` by ``"SCHEME, TIME"``, of the schemes ``euler`` and ``ddim``. Told the time
        of the state they are one but for the step from t = 1.
    """
    found = {}
    for time in TIMES:
        for name, scheme in (("euler", euler_inversion), ("ddim", ddim_inversion)):
            start = scheme(velocity, x_1, grid, time=time).trajectory[0]
            found[f"{name}, {time}"] = _relative(integrate(velocity, start, grid).x, x_1).cpu()
    return found


def _relative(value: Tensor, true: Tensor) -> Tensor:
    value, true = value.cpu().double().flatten(1), true.cpu().double().flatten(1)
    return (value - true).norm(dim=1) / true.norm(dim=1)


@torch.no_grad()
def evaluate_inversion_error(
    models: Sequence[FlowModel],
    *,
    steps: Sequence[int] = STEPS,
    limit: int = LIMIT,
    reference_steps: int = REFERENCE_STEPS,
    first_seed: int = REPORTED_SEED,
    batch_size: int = BATCH,
) -> dict[str, Any]:
    """Measure models on the same held-out scenes, each on its own grid (`student_grid`).

    Args:
        models: diffusion models and flows; a comparison is made of each pair, in this order.
        steps: numbers of steps N.
        limit: scenes.
        reference_steps: of the accurate solution.
        first_seed: of the first scene.
        batch_size: scenes through the network at a time.

    Returns:
        ``{"n", "seeds", "reference_steps", "models": {NAME: {"kind", "weight_hash", "steps":
        {N: {"times", "errors": {"COORDINATES, TIME": {"mean", "low", "high", "per_step"}},
        "round_trip": {"SCHEME, TIME": {"mean", "low", "high"}}}}}}, "compared", "sentences"}``.
        Means are over images (and steps), intervals of 95 % over images.
    """
    rows: dict[str, dict[int, dict[str, Rows]]] = {}
    found: dict[str, Any] = {}
    for model in models:
        rows[model.name], by_steps = {}, {}
        grids = {count: model.student_grid(count) for count in steps}
        measured = _measured(
            model, grids, range(first_seed, first_seed + limit), reference_steps, batch_size
        )
        for count, (errors, trips) in measured.items():
            means = {name: np.nanmean(values, axis=0) for name, values in errors.items()}
            rows[model.name][count] = means | {f"round trip, {k}": v for k, v in trips.items()}
            by_steps[str(count)] = {
                "times": grids[count].tolist(),
                "errors": {
                    name: estimate(means[name]) | {"per_step": values.mean(1).tolist()}
                    for name, values in errors.items()
                },
                "round_trip": {name: estimate(values) for name, values in trips.items()},
            }
        found[model.name] = {
            "kind": kind(model),
            "weight_hash": model.weight_hash,
            "steps": by_steps,
        }
    figures: dict[str, Any] = {
        "n": limit,
        "seeds": [first_seed, first_seed + limit - 1],
        "reference_steps": reference_steps,
        "models": found,
    }
    figures["compared"] = compared(rows, {name: entry["kind"] for name, entry in found.items()})
    figures["sentences"] = [sentence(pair) for pair in figures["compared"]]
    return figures


def kind(model: FlowModel) -> str:
    """`"diffusion"` or `"flow"`: in whose coordinates a model's network works."""
    return "flow" if model.diffusion_path is None else "diffusion"


def _measured(
    model: FlowModel,
    grids: Mapping[int, Tensor],
    seeds: range,
    reference_steps: int,
    batch_size: int,
) -> dict[int, tuple[dict[str, Rows], dict[str, Rows]]]:
    """Errors ``[N, n]`` and round trips ``[n]`` of a model on each grid."""
    errors: dict[int, dict[str, list[Tensor]]] = {count: {} for count in grids}
    trips: dict[int, dict[str, list[Tensor]]] = {count: {} for count in grids}
    every = torch.cat([grid.double() for grid in grids.values()]).unique()
    for first in range(0, len(seeds), batch_size):
        scenes = [sample(seed) for seed in seeds[first : first + batch_size]]
        x_1 = model.encode_image(pictures(scenes))
        field = GuidedVelocity(model, model.encode_prompt([caption(scene) for scene in scenes]))
        path = accurate_states(field, x_1, every, reference_steps, model.t_max)
        for count, grid in grids.items():
            states = path[torch.searchsorted(every, grid.double())]
            for name, part in approximation_errors(field, states, grid).items():
                errors[count].setdefault(name, []).append(part)
            for name, part in round_trips(field, x_1, grid).items():
                trips[count].setdefault(name, []).append(part)
    return {
        count: (
            {name: torch.cat(parts, 1).numpy() for name, parts in errors[count].items()},
            {name: torch.cat(parts).numpy() for name, parts in trips[count].items()},
        )
        for count in grids
    }


def estimate(values: Rows) -> dict[str, float]:
    """A mean over images with its 95 % interval."""
    low, high = interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}
