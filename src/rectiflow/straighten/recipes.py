"""Named configurations, as data: the paper's runs, and short ones for the embedded world.

A recipe is a list of phases. Phases of one kind (reflow or distill) follow one another, each from
the averaged weights of the one before; between the kinds lies a new store of pairs, made by the
model that was reflowed. Figures: InstaFlow, Liu et al. 2023, arXiv 2309.06380, sections 4 and 5 and
the model cards of its checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rectiflow.errors import InputError


@dataclass(frozen=True)
class PairPlan:
    """How the pairs of a phase are made: `rectiflow pairs` with these options."""

    teacher: str
    """A model, or the name of the phase whose result it is."""
    solver: str
    num_inference_steps: int
    guidance_scale: float
    num: int | None = None
    """How many; None where the paper does not say."""


@dataclass(frozen=True)
class Phase:
    """One run of training.

    Args:
        name: Of its folder in the run.
        settings: Of `StraightenConfig`, where they differ from its defaults.
        pairs: What it is trained on.
        baseline: For comparison: run only when asked for by name.
    """

    name: str
    settings: dict[str, Any]
    pairs: PairPlan
    baseline: bool = False

    @property
    def kind(self) -> str:
        """`reflow` or `distill`."""
        return str(self.settings["kind"])


@dataclass(frozen=True)
class Recipe:
    """A named list of phases.

    Args:
        name: What it is called.
        about: In a few words.
        model: Where its first phase begins, if nothing else is named.
        phases: In order.
    """

    name: str
    about: str
    model: str
    phases: tuple[Phase, ...] = field(default_factory=tuple)

    def of_kind(self, kind: str, only: str | None = None) -> list[Phase]:
        """The phases that a command runs.

        Args:
            kind: `reflow` or `distill`.
            only: The name of one phase, which may be a baseline.

        Raises:
            InputError: There is none.
        """
        mine = [phase for phase in self.phases if phase.kind == kind]
        if only is None:
            found = [phase for phase in mine if not phase.baseline]
        else:
            found = [phase for phase in mine if phase.name == only]
        if not found:
            names = ", ".join(phase.name for phase in mine) or "none"
            what = f"phase {only!r} of kind {kind}" if only else f"phase of kind {kind}"
            raise InputError(f"{self.name} has no {what}; of that kind there are: {names}")
        return found


PAPER: dict[str, Any] = {
    "start": "reuse",
    "optimizer": "adamw",
    "betas": (0.9, 0.999),
    "weight_decay": 0.01,
    "learning_rate": 1e-6,
    "warmup_steps": 1000,
    "grad_clip": 1.0,
    "ema_decay": 0.9999,
    "mixed_precision": "bf16",
    "loss": "l2",
    "time_law": "uniform",
    "student_steps": (1,),
}
"""What the paper's phases have in common. (It gives no rate for distilling; this is that of its
first reflow.)"""

SD_1_4 = "CompVis/stable-diffusion-v1-4"
SD_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def _phase(
    name: str,
    kind: Literal["reflow", "distill"],
    steps: int,
    batch_size: int,
    pairs: PairPlan,
    baseline: bool = False,
    **more: Any,
) -> Phase:
    settings = PAPER | {"kind": kind, "steps": steps, "batch_size": batch_size} | more
    return Phase(name, settings, pairs, baseline)


def _preliminary() -> Recipe:
    teacher = PairPlan(SD_1_4, "dpmpp", 25, 5.0, 1_600_000)
    reflowed = PairPlan("reflow", "euler", 25, 1.5, 1_600_000)
    more = PairPlan(SD_1_4, "dpmpp", 25, 5.0, 3_200_000)
    return Recipe(
        "instaflow-preliminary",
        "the paper's first experiment, with direct distillation as its baseline",
        SD_1_4,
        (
            _phase("reflow", "reflow", 50_000, 32, teacher),
            _phase("distill", "distill", 50_000, 32, reflowed),
            _phase("direct-distill", "distill", 100_000, 32, more, baseline=True),
        ),
    )


def _instaflow() -> Recipe:
    teacher = PairPlan(SD_1_5, "dpmpp", 25, 5.0)
    reflowed = PairPlan("reflow-2", "euler", 25, 1.5)
    return Recipe(
        "instaflow-0.9b",
        "InstaFlow-0.9B: reflow twice over, then distil by L2 and by LPIPS",
        SD_1_5,
        (
            _phase("reflow-1", "reflow", 70_000, 64, teacher),
            _phase("reflow-2", "reflow", 25_000, 1024, teacher, learning_rate=1e-7),
            _phase("distill-l2", "distill", 21_500, 1024, reflowed),
            _phase("distill-lpips", "distill", 18_000, 1024, reflowed, loss="lpips"),
        ),
    )


def _stacked() -> Recipe:
    reflowed = PairPlan("instaflow-0.9b/reflow-2", "euler", 25, 1.5)
    return Recipe(
        "instaflow-1.7b",
        "InstaFlow-1.7B: the 2-rectified flow of instaflow-0.9b into two U-Nets in series",
        "instaflow-0.9b/reflow-2",
        (
            _phase("distill-l2", "distill", 110_000, 64, reflowed, stacked="separate"),
            _phase("distill-lpips", "distill", 2_500, 320, reflowed, loss="lpips"),
        ),
    )


def _toy() -> Recipe:
    common: dict[str, Any] = {
        "start": "reuse",
        "batch_size": 16,
        "learning_rate": 3e-4,
        "loss": "pseudo_huber",
        "warmup_steps": 20,
        "ema_decay": 0.99,
        "measure_every": 100,
        "log_every": 10,
        "held_out": 16,
        "checkpoint_minutes": 1,
    }
    teacher = PairPlan("emoji-sd", "dpmpp", 25, 5.0, 128)
    reflowed = PairPlan("reflow", "euler", 8, 1.0, 128)
    distill = common | {"kind": "distill"}
    pictures = {"loss": "lpips", "lpips_weights": "emoji-clip", "steps": 30}
    return Recipe(
        "toy",
        "minutes on a CPU with the embedded emoji-sd: to see every part at work, not for quality",
        "emoji-sd",
        (
            Phase("reflow", common | {"kind": "reflow", "steps": 200}, teacher),
            Phase("distill-l2", distill | {"steps": 120}, reflowed),
            Phase("distill-clip", distill | pictures, reflowed),
        ),
    )


def _emoji() -> Recipe:
    common: dict[str, Any] = {
        "start": "reuse",
        "loss": "pseudo_huber",
        "batch_size": 64,
        "learning_rate": 3e-4,
        "muon_learning_rate": 5e-4,
        "warmup_steps": 20,
        "ema_decay": 0.99,
        "mixed_precision": "bf16",
        "measure_every": 200,
        "log_every": 20,
        "held_out": 64,
        "held_out_batch": 64,
        "held_out_steps": 10,
        "checkpoint_minutes": 2,
    }
    teacher = PairPlan("emoji-sd", "dpmpp", 25, 5.0, 8192)
    reflowed = PairPlan("reflow", "euler", 8, 1.0, 8192)
    reflow = common | {"kind": "reflow", "steps": 900, "decay_steps": 300}
    distill = common | {"kind": "distill", "steps": 1300, "decay_steps": 500}
    direct = distill | {"steps": 2200, "decay_steps": 800}
    pictures = {"loss": "lpips", "lpips_weights": "emoji-clip", "decode_chunk": 16}
    pictures |= {"steps": 48, "decay_steps": 24, "measure_every": 0}
    pictures |= {"learning_rate": 1e-4, "muon_learning_rate": 2e-4}
    return Recipe(
        "emoji-instaflow",
        "the shipped emoji-2rf and emoji-instaflow; as baselines direct distillation of as many "
        "samples, and LPIPS in emoji-clip's features after L2",
        "emoji-sd",
        (
            Phase("reflow", reflow, teacher),
            Phase("distill", distill, reflowed),
            Phase("distill-clip", distill | pictures, reflowed, baseline=True),
            Phase("direct", direct, teacher, baseline=True),
        ),
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (_preliminary(), _instaflow(), _stacked(), _toy(), _emoji())
}


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        InputError: There is no such recipe.
    """
    if name not in RECIPES:
        raise InputError(f"unknown configuration {name!r}: one of {', '.join(RECIPES)}, or a file")
    return RECIPES[name]
