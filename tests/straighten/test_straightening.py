"""Straightening a flow whose optimum is known: from N(0, 1) to N(m, s²), by prompt.

The trained fields are linear in the state and reach the optimum; what theory says of it (Liu et
al. 2022, arXiv 2209.03003) is then there in numbers.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.solver import integrate
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.straighten import coupling, monitor, online
from rectiflow.straighten.config import validate
from rectiflow.straighten.settings import StraightenConfig
from rectiflow.straighten.straightening import StraightenTask
from rectiflow.straighten.trainer import Trainer
from tests.straighten.test_coupling import PAIRS, SHAPE, stored
from tests.straighten.toy_flow import PROMPTS, WORLD, ToyFlow, TrainedWorld

HELD_OUT = coupling.StoredPairs(stored)(range(5000, 5400))


def settings(**given: object) -> StraightenConfig:
    defaults: dict[str, object] = {
        "model": "toy",
        "pairs": "memory",
        "steps": 250,
        "batch_size": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 10,
        "decay_steps": 100,
        "weight_decay": 0.0,
        "ema_decay": 0.9,
        "measure_every": 0,
        "held_out_batch": 400,
        "checkpoint_minutes": 60,
    }
    return validate(StraightenConfig, defaults | given)


def train(
    run: Path, start: ToyFlow | None = None, draw: coupling.Coupling = PAIRS, **given: object
) -> ToyFlow:
    """A trained student, with its averaged weights."""
    config = settings(**given)
    model = ToyFlow(copy.deepcopy(start.network)) if start else ToyFlow()
    task = StraightenTask(config, model, draw)
    trainer = Trainer(task, config, run)
    trainer.train()
    with trainer.learner.averaged():
        return ToyFlow(copy.deepcopy(model.network))


def measured(model: ToyFlow, *student_steps: int) -> dict[str, float]:
    cond = model.encode_prompt(HELD_OUT.prompts)
    probe = monitor.Probe(HELD_OUT, cond, 40, student_steps or (1,), batch_size=400)
    return monitor.measure(model, probe)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ToyFlow:
    """1-rectified flow, by flow matching from independent noise and data."""
    run = tmp_path_factory.mktemp("teacher")
    independent = coupling.Independent(PAIRS, seed=1)
    return train(run, draw=independent, kind="flow_matching")


@pytest.fixture(scope="module")
def reflowed(teacher: ToyFlow, tmp_path_factory: pytest.TempPathFactory) -> ToyFlow:
    """2-rectified flow, from pairs that the teacher makes online."""
    maker = online.Teacher(teacher, "midpoint", 20, (1.0,))
    draw = online.OnlineTeacher(maker, PROMPTS, SHAPE, seed=9)
    run = tmp_path_factory.mktemp("reflow")
    return train(run, teacher, draw, coupling="online", pairs=None, prompts="memory")


def ends(model: ToyFlow, prompt: str) -> Tensor:
    x_0 = coupling.stored_noise(77, range(3000), SHAPE)
    field = GuidedVelocity(model, model.encode_prompt(prompt))
    return integrate(field, x_0, monitor.accurate_grid(model, 20), "midpoint").x


def test_flow_matching_has_the_known_least_loss(teacher: ToyFlow) -> None:
    """At the true field it is `∫ Var(x_1 - x_0 | x_t) dt = π s / 2`; nothing has less."""
    independent = coupling.Independent(PAIRS, seed=1)
    losses = {}
    for name, model in {"true": ToyFlow(TrainedWorld()), "trained": teacher}.items():
        task = StraightenTask(settings(kind="flow_matching"), model, independent)
        with torch.no_grad():
            losses[name] = task.network(**task.batch(range(3000)))
    wanted = sum(math.pi * flow.scale / 2 for flow in WORLD.values()) / 2
    error = float(losses["true"].std()) / 3000**0.5
    assert float(losses["true"].mean()) == pytest.approx(wanted, abs=4 * error)
    more = (losses["trained"] - losses["true"]).mean()
    assert 0 < float(more) < 0.1 * wanted


def test_reflow_straightens_and_keeps_the_marginals(teacher: ToyFlow, reflowed: ToyFlow) -> None:
    before, after = measured(teacher), measured(reflowed)
    assert before["straightness"] > 0.3
    assert after["straightness"] < 0.02 * before["straightness"]
    assert after["1_step_error"] < 0.02 * before["1_step_error"]
    assert after["transport_cost"] < 1.02 * before["transport_cost"]
    for prompt, flow in WORLD.items():
        old, new = ends(teacher, prompt), ends(reflowed, prompt)
        assert float(old.std()) == pytest.approx(flow.scale, rel=0.15)
        assert float(new.mean()) == pytest.approx(float(old.mean()), abs=0.03 * flow.scale)
        assert float(new.std()) == pytest.approx(float(old.std()), rel=0.03)


def test_distilling_an_affine_map_reaches_zero(teacher: ToyFlow, tmp_path: Path) -> None:
    student = train(tmp_path, teacher, kind="distill", steps=200)
    error = measured(student)["1_step_pair_error"]
    assert error < 1e-3 < 0.3 < measured(teacher)["1_step_pair_error"]


def test_a_student_of_many_numbers_of_steps_is_good_at_each(
    teacher: ToyFlow, tmp_path: Path
) -> None:
    """Distilled at one step alone, it falls apart at four."""
    one = train(tmp_path / "one", teacher, kind="distill", steps=120)
    many = train(tmp_path / "many", teacher, kind="distill", steps=120, student_steps=[1, 2, 4])
    alone, together = measured(one, 1, 2, 4), measured(many, 1, 2, 4)
    for k in (1, 2, 4):
        assert together[f"{k}_step_pair_error"] < 0.03
    assert alone["4_step_pair_error"] > 10 * together["4_step_pair_error"]


def test_reflow_at_the_students_own_times(teacher: ToyFlow) -> None:
    config = settings(time_law="grid", student_steps=[1, 4])
    batch = StraightenTask(config, teacher, PAIRS).batch(range(200))
    assert set(batch["t"].tolist()) == {0.0, 0.25, 0.5, 0.75}


def test_windows_make_each_piece_straight(teacher: ToyFlow, tmp_path: Path) -> None:
    """Three windows: three Euler steps end where the teacher does."""
    maker = online.Teacher(teacher, "midpoint", 12, (1.0,))
    draw = online.Windows(maker, teacher.student_grid(3), online.NoiseAlone(PROMPTS, SHAPE, 3), 3)
    # The field jumps where windows meet; at the times it is asked for, a smooth network can follow.
    given = {"pairs": None, "prompts": "memory", "windows": 3, "time_law": "grid"}
    student = train(tmp_path, teacher, draw, steps=120, decay_steps=80, **given)
    x_0, cond = HELD_OUT.x_0, student.encode_prompt(HELD_OUT.prompts)
    goal = monitor.few_steps(teacher, cond, x_0, 400)
    errors = [
        float(monitor.mean_square(monitor.few_steps(model, cond, x_0, 3) - goal).mean())
        for model in (student, teacher)
    ]
    assert errors[0] < 0.01 < errors[1] / 5


def test_annealed_reflow_ends_as_reflow(tmp_path: Path) -> None:
    """From nothing: flow matching first, the pairs' own noise in the end."""
    config = settings()
    draw = coupling.Annealed(PAIRS, seed=0, samples=100 * config.batch_size)
    student = train(tmp_path, draw=draw, anneal_steps=100, steps=200)
    assert measured(student)["straightness"] < 0.05


@pytest.mark.parametrize("kind", ["reflow", "distill"])
def test_the_loss_is_its_definition(teacher: ToyFlow, kind: str) -> None:
    """Written out from the pairs, for one sample after the other."""
    task = StraightenTask(settings(kind=kind, student_steps=[1, 2]), teacher, PAIRS)
    numbers = [4, 9, 2]
    batch = task.batch(numbers)
    found = task.network(**batch)
    pairs = PAIRS(numbers)
    for row in range(3):
        cond = teacher.encode_prompt([pairs.prompts[row]])
        x_0, x_1 = pairs.x_0[[row]], pairs.x_1[[row]]
        if kind == "reflow":
            t = batch["t"][row]
            v = teacher.velocity((1 - t) * x_0 + t * x_1, t, cond)
            wanted = (v - (x_1 - x_0)).square().mean()
        else:
            x, k = x_0, int(batch["steps"][row])
            for i in range(k):
                x = x + teacher.velocity(x, i / k, cond) / k
            wanted = (x - x_1).square().mean()
        torch.testing.assert_close(found[row].detach(), wanted)


def test_gradients_reach_the_network_through_all_steps(teacher: ToyFlow) -> None:
    """Against automatic differentiation of the steps written out, for a batch of mixed steps."""
    task = StraightenTask(settings(kind="distill", student_steps=[1, 3]), teacher, PAIRS)
    batch = task.batch(range(6))
    assert set(batch["steps"].tolist()) == {1, 3}
    gradients = []
    for written_out in (False, True):
        task.network.zero_grad()
        if written_out:
            for row, k in enumerate(batch["steps"].tolist()):
                x, embeds = batch["x"][[row]], batch["cond_embeds"][[row]]
                for i in range(k):
                    x = x + teacher.network(x, torch.tensor([i / k]), embeds) / k
                ((x - batch["target"][[row]]).square().mean() / 6).backward()
        else:
            task.network(**batch).mean().backward()
        gradients.append([p.grad.clone() for p in task.network.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_network_is_reached_through_forward_and_owned_once(teacher: ToyFlow) -> None:
    task = StraightenTask(settings(), teacher, PAIRS)
    names = [name for name, _ in task.network.named_parameters()]
    assert names and all(name.startswith("network.inner.") for name in names)
    assert list(task.network.state_dict()) == names
    calls = []
    handle = task.network.network.register_forward_hook(lambda *_: calls.append(1))
    task.network(**task.batch(range(4)))
    handle.remove()
    assert calls == [1]


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Gradients are added up over processes: the same losses to 1e-5 at the same global batch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    curves = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), "-m", "tests.straighten.toy_run", str(run)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        lines = (run / "log.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines if '"loss"' in line])
    assert len(curves[0]) == 20 and curves[0][0] > 2 * curves[0][-1]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


def test_a_resumed_run_is_an_unbroken_one(tmp_path: Path) -> None:
    config = settings(steps=12, decay_steps=0, log_every=1, anneal_steps=6)

    def trainer(run: Path, steps: int) -> Trainer:
        chosen = config.model_copy(update={"steps": steps})
        draw = coupling.Annealed(PAIRS, 0, samples=6 * config.batch_size)
        return Trainer(StraightenTask(chosen, ToyFlow(), draw), chosen, run)

    whole = trainer(tmp_path / "whole", 12)
    whole.train()
    trainer(tmp_path / "parts", 5).train()
    rest = trainer(tmp_path / "parts", 12)
    assert rest.resume()
    rest.train()
    weights = zip(whole.learner.parameters, rest.learner.parameters, strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    losses = []
    for run in ("whole", "parts"):
        lines = (tmp_path / run / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"loss"' in line])
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_measures_go_to_the_log_with_sheets_beside_them(tmp_path: Path) -> None:
    config = settings(steps=4, decay_steps=0, log_every=2, measure_every=2)
    task = StraightenTask(config, ToyFlow(), PAIRS, HELD_OUT)
    Trainer(task, config, tmp_path).train()
    text = (tmp_path / "log.jsonl").read_text()
    for name in ("straightness", "transport_cost", "1_step_error", "1_step_pair_error"):
        assert name in text
    assert list((tmp_path / "samples").glob("*.png"))
    assert task.network.network.training


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"speed": 1}, "speed"),
        ({"kind": "flow_matching", "coupling": "stored"}, "flow matching"),
        ({"pairs": None}, "prompts"),
        ({"coupling": "online", "prompts": "p.txt"}, "leave pairs out"),
        ({"windows": 4}, "windows_from"),
        ({"windows": 4, "loss": "lpips", "lpips_weights": "w"}, "windows are for"),
        ({"loss": "lpips_huber"}, "lpips_weights"),
        ({"kind": "distill", "anneal_steps": 5}, "anneal_steps"),
        ({"kind": "distill", "loss_space": "prediction"}, "loss_space"),
        ({"anneal_steps": 10**6}, "more than steps"),
        ({"real": "there"}, "real_share"),
        ({"student_steps": []}, "student_steps"),
        ({"time_law": "sideways"}, "time_law"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(
    given: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        settings(**given)
    assert "\n" not in str(caught.value)


def test_the_coupling_follows_from_the_rest() -> None:
    assert settings().coupling == "stored"
    assert settings(kind="flow_matching").coupling == "independent"
    assert settings(pairs=None, prompts="p.txt").coupling == "online"
