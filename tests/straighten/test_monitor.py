"""What is measured of a student, against flows whose figures are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from rectiflow.models import Conditioning
from rectiflow.straighten import coupling, monitor
from tests.straighten.test_coupling import stored
from tests.straighten.toy_flow import WORLD, ToyFlow, TrainedWorld
from tests.tiny_sd import tiny_sd_model

PIECE = coupling.StoredPairs(stored)(range(300))


class Straight(ToyFlow):
    """The reflowed world: from x_0 to m + s x_0 along a line."""

    def differentiable_velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        rows = [WORLD["wide" if float(e[0, 0]) else "narrow"] for e in cond.embeds]
        mean = torch.tensor([flow.mean for flow in rows])[:, None, None, None]
        scale = torch.tensor([flow.scale for flow in rows])[:, None, None, None]
        t = torch.as_tensor(t, dtype=torch.float32)
        x_0 = (x - t * mean) / (1 - t + t * scale)
        return mean + (scale - 1) * x_0


def probe(model: ToyFlow, **given: object) -> monitor.Probe:
    cond = model.encode_prompt(PIECE.prompts)
    settings = {"num_inference_steps": 24, "student_steps": (1, 2), "batch_size": 256} | given
    return monitor.Probe(PIECE, cond, **settings)  # type: ignore[arg-type]


def test_the_world_has_its_figures() -> None:
    model = ToyFlow(TrainedWorld())
    found = monitor.measure(model, probe(model))
    straight = sum(flow.straightness for flow in WORLD.values()) / 2
    cost = sum(flow.transport_cost for flow in WORLD.values()) / 2
    assert found["straightness"] == pytest.approx(straight, abs=4 * found["straightness_error"])
    assert found["straightness_error"] < 0.15 * straight
    assert found["transport_cost"] == pytest.approx(cost, rel=0.1)
    assert found["pair_error"] < 1e-3
    # One step by hand: v(x_0, 0) = m - x_0, so it ends on m, s x_0 away from the pair.
    squares = [
        (WORLD[prompt].scale * float(x_0)) ** 2
        for prompt, x_0 in zip(PIECE.prompts, PIECE.x_0, strict=True)
    ]
    assert found["1_step_pair_error"] == pytest.approx(sum(squares) / len(squares), rel=1e-3)
    assert found["1_step_error"] == pytest.approx(found["1_step_pair_error"], rel=1e-2)
    assert found["2_step_error"] < found["1_step_error"]


def test_a_straight_flow_has_none_of_it() -> None:
    model = Straight()
    found = monitor.measure(model, probe(model))
    for name in ("straightness", "pair_error", "1_step_error", "2_step_pair_error"):
        assert found[name] < 1e-6, name


def test_measures_do_not_depend_on_the_batches() -> None:
    model = ToyFlow(TrainedWorld())
    whole = monitor.measure(model, probe(model, num_inference_steps=10, batch_size=300))
    parts = monitor.measure(model, probe(model, num_inference_steps=10, batch_size=7))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_of_flow_matching_no_pair_is_asked_for() -> None:
    model = Straight()
    found = monitor.measure(model, probe(model, paired=False))
    assert not [name for name in found if "pair" in name]
    assert {"straightness", "transport_cost", "1_step_error"} <= set(found)


def test_the_accurate_grid_knows_where_a_diffusion_field_bends() -> None:
    model = tiny_sd_model()
    grid = monitor.accurate_grid(model, 20)
    assert float(grid[0]) == pytest.approx(model.t_min) and float(grid[-1]) == 1
    assert bool(torch.isclose(grid, grid.new_tensor(model.t_max)).any())
    assert bool((grid.diff() > 0).all())
    assert torch.equal(monitor.accurate_grid(ToyFlow(), 4), torch.linspace(0, 1, 5).double())


def test_a_network_is_told_the_guidance_it_was_made_for() -> None:
    model = tiny_sd_model(guidance_embedded=True)
    cond = monitor.told(model, model.encode_prompt(["a cat", "a dog"]), torch.tensor([1.0, 7.0]))
    x = torch.randn(2, *model.latent_shape(32, 32))
    field = monitor.conditional(model, cond)
    assert torch.equal(field(x, torch.tensor(0.5), 0), model.velocity(x, 0.5, cond))
    assert monitor.told(ToyFlow(), cond, torch.ones(2)) is cond


def test_a_sheet_has_a_row_for_every_number_of_steps(tmp_path: Path) -> None:
    model = tiny_sd_model(rectified=True)
    shape = model.latent_shape(32, 32)
    noise = coupling.stored_noise(0, range(3), shape)
    piece = coupling.Piece.whole(noise, torch.zeros_like(noise), ["a cat", "a dog", "two hearts"])
    cond = model.encode_prompt(piece.prompts)
    drawn = monitor.Probe(piece, cond, num_inference_steps=2, student_steps=(1, 2))
    monitor.draw_sheet(model, drawn, tmp_path / "a.png")
    monitor.draw_sheet(model, drawn, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as sheet:
        columns, rows = 3, 4  # 1 step, 2 steps, midpoint, pair; 32 pixels four times as large
        assert sheet.width == columns * (128 + 2) and sheet.height == rows * (128 + 2 + 12)


def test_looking_leaves_the_network_as_it_was() -> None:
    network = torch.nn.Dropout()
    with pytest.raises(KeyError), monitor.evaluating(network):
        assert not network.training
        raise KeyError
    assert network.training
