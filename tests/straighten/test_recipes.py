"""The named configurations against the paper's figures, typed in again."""

from __future__ import annotations

import pytest

from rectiflow.errors import InputError
from rectiflow.straighten.config import validate
from rectiflow.straighten.recipes import RECIPES, Phase, get_recipe
from rectiflow.straighten.settings import StraightenConfig

# name -> phase -> (kind, batch, steps, rate, loss)
PUBLISHED = {
    "instaflow-preliminary": {
        "reflow": ("reflow", 32, 50_000, 1e-6, "l2"),
        "distill": ("distill", 32, 50_000, 1e-6, "l2"),
        "direct-distill": ("distill", 32, 100_000, 1e-6, "l2"),
    },
    "instaflow-0.9b": {
        "reflow-1": ("reflow", 64, 70_000, 1e-6, "l2"),
        "reflow-2": ("reflow", 1024, 25_000, 1e-7, "l2"),
        "distill-l2": ("distill", 1024, 21_500, 1e-6, "l2"),
        "distill-lpips": ("distill", 1024, 18_000, 1e-6, "lpips"),
    },
    "instaflow-1.7b": {
        "distill-l2": ("distill", 64, 110_000, 1e-6, "l2"),
        "distill-lpips": ("distill", 320, 2_500, 1e-6, "lpips"),
    },
}


def configuration(name: str, phase: Phase) -> StraightenConfig:
    given = {"recipe": f"{name}/{phase.name}", "model": "m", "pairs": "p"}
    if phase.settings.get("loss") == "lpips":
        given["lpips_weights"] = "w"  # everyone has to bring their own
    given |= phase.settings
    return validate(StraightenConfig, given)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_runs(name: str) -> None:
    recipe = get_recipe(name)
    found = {}
    for phase in recipe.phases:
        config = configuration(name, phase)
        found[phase.name] = (
            config.kind,
            config.batch_size,
            config.steps,
            config.learning_rate,
            config.loss,
        )
        assert config.optimizer == "adamw" and config.ema_decay == 0.9999
        assert config.grad_clip == 1 and config.warmup_steps == 1000
        assert config.mixed_precision == "bf16" and config.start == "reuse"
        assert config.time_law == "uniform" and config.student_steps == (1,)
    assert found == PUBLISHED[name]


def test_the_papers_pairs() -> None:
    plans = {
        (name, phase.name): phase.pairs for name in PUBLISHED for phase in RECIPES[name].phases
    }
    for (_, phase), plan in plans.items():
        assert plan.num_inference_steps == 25
        of_teacher = phase.startswith(("reflow", "direct"))
        assert (plan.solver, plan.guidance_scale) == (
            ("dpmpp", 5.0) if of_teacher else ("euler", 1.5)
        )
    counts = {phase: plan.num for (name, phase), plan in plans.items() if "prel" in name}
    assert counts == {"reflow": 1_600_000, "distill": 1_600_000, "direct-distill": 3_200_000}
    assert RECIPES["instaflow-preliminary"].model == "CompVis/stable-diffusion-v1-4"
    assert RECIPES["instaflow-0.9b"].model == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_the_larger_model_is_two_unets() -> None:
    first, second = RECIPES["instaflow-1.7b"].phases
    assert configuration("", first).stacked == "separate"
    assert configuration("", second).stacked is None  # it begins as what the first has made


def test_a_command_runs_the_phases_of_its_kind() -> None:
    recipe = get_recipe("instaflow-preliminary")
    assert [phase.name for phase in recipe.of_kind("reflow")] == ["reflow"]
    assert [phase.name for phase in recipe.of_kind("distill")] == ["distill"]
    assert [p.name for p in recipe.of_kind("distill", "direct-distill")] == ["direct-distill"]
    with pytest.raises(InputError, match="direct-distill"):
        recipe.of_kind("distill", "reflow")
    with pytest.raises(InputError, match="of kind reflow"):
        get_recipe("instaflow-1.7b").of_kind("reflow")
    with pytest.raises(InputError, match="instaflow-9b"):
        get_recipe("instaflow-9b")


@pytest.mark.parametrize("name", RECIPES)
def test_every_phase_is_a_valid_configuration(name: str) -> None:
    for phase in RECIPES[name].phases:
        assert configuration(name, phase).kind == phase.kind
    assert len({phase.name for phase in RECIPES[name].phases}) == len(RECIPES[name].phases)
