"""InstaFlow (Liu et al. 2023, arXiv 2309.06380) on the embedded world: what to train and measure.

The paper's recipe re-uses the teacher's weights under another meaning, draws times uniformly and
compares velocities by L2. Its students are called `paper-…` here, and `2rf-…` are reflowed with one
setting of it changed; `2rf-0`, `one-0` and `direct-0` keep the field that the teacher defines
exactly and draw u-shaped times. Those that ship (`emoji-…`) are the paper's with pseudo-Huber and
Muon, trained for longer. A student and what it is compared with see the same number of training
samples.
"""

from __future__ import annotations

from typing import Any, Literal

from rectiflow.reproduce.study import Flow, Item, Pictures, Settings, Store, Student, Study
from rectiflow.straighten.recipes import get_recipe

TEACHER = "emoji-sd"
GUIDANCE = 5.0
STEPS = 25
SHIPPED = "emoji-instaflow"
"""The recipe of the models that ship."""

COMMON: Settings = {
    "start": "exact",
    "batch_size": 32,
    "learning_rate": 3e-4,
    "warmup_steps": 20,
    "ema_decay": 0.98,
    "log_every": 20,
    "measure_every": 0,
    "held_out": 0,
    "sample_minutes": 1e6,
    "checkpoint_minutes": 2,
}
REUSE: Settings = {"start": "reuse"}
U_SHAPED: Settings = {"time_law": "u_shaped"}
MUON: Settings = {"muon_learning_rate": 5e-4}
HUBER: Settings = {"loss": "pseudo_huber"}
SMALL_BATCHES: Settings = {"batch_size": 8, "learning_rate": 6e-4, "ema_decay": 0.99}
"""More steps for the same samples, at twice the rate."""
SEEDS = (0, 1, 2)
K_STEPS = (1, 2, 4, 8)
ALPHAS = (1.0, 1.5, 2.0, 3.0, 5.0)
SHARES = (3, 5)
"""Of the samples of the other students: one in so many."""
OTHER_PAIRS = ((256, GUIDANCE), (1024, GUIDANCE), (1024, 2.0), (1024, 8.0))
"""Numbers of teacher's pairs and guidance, beside those of the other students."""
FEW_PAIRS = "few-pairs-{}"
"""What students are called that are distilled on few pairs."""
TRAILING = ("dpmpp", "unipc", "ddim")
"""Solvers on trailing timesteps, so that few steps of the teacher are judged by its best."""
STACKING = ("stacked", "stacked-direct", "single-direct")
NUM = 5000
"""Pictures of a row that a Fréchet distance is taken of; `FEW` where rows only vary one setting."""
FEW = 1000
JUDGED, SOME = 600, 100
"""Of these the judge, who takes his time, sees so many."""


def instaflow(size: Literal["small", "full"]) -> Study:
    """The study, at a size.

    `small` trains one seed of what claims (a) and (b) need; `full` three, and everything else.
    """
    return _small() if size == "small" else _full()


def _phase(kind: str, steps: int, **more: Any) -> Settings:
    return COMMON | {"kind": kind, "steps": steps, "decay_steps": steps // 4} | more


def _reflow(steps: int, **more: Any) -> Settings:
    return _phase("reflow", steps, **more)


def _distill(steps: int, **more: Any) -> Settings:
    return _phase("distill", steps, **more)


def _reflowed_pairs(student: str, num: int) -> Store:
    """What a 2-rectified flow makes of noise, in few steps since it is nearly straight.

    Without guidance: its pairs were made under the teacher's, and more of it (the paper takes 1.5)
    makes pictures worse here, which is claim (e).
    """
    return Store(f"pairs-of-{student}", student, num, 8, 1.0, "euler")


def _at(model: str, steps: int, num: int, *against: str, judged: int = SOME) -> Pictures:
    """A row of pictures, named for its model and steps."""
    name = f"{model}-at-{steps}"
    return Pictures(name, model, steps, num=num, against=against, judged=judged)


def _teacher_at(steps: int, num: int, judged: int = SOME) -> Pictures:
    return Pictures(f"teacher-at-{steps}", TEACHER, steps, GUIDANCE, "dpmpp", num, judged=judged)


def _small() -> Study:
    steps = 100
    teacher = Store("pairs-teacher", TEACHER, 1024, STEPS, GUIDANCE)
    flow, one, direct = (f"paper-{kind}-0" for kind in ("2rf", "one", "direct"))
    pairs = _reflowed_pairs(flow, 1024)
    items: list[Item] = [
        teacher,
        Student(flow, TEACHER, teacher.name, (_reflow(steps, **REUSE),)),
        pairs,
        Student(one, flow, pairs.name, (_distill(steps),)),
        Student(direct, TEACHER, teacher.name, (_distill(2 * steps, **REUSE),)),
        Flow("flow-teacher", TEACHER, GUIDANCE, 128),
        Flow("flow-teacher-alpha-1", TEACHER, 1.0, 128),
        Flow(f"flow-{flow}", flow, 1.0, 128),
        _teacher_at(STEPS, FEW),
        *(_at(name, 1, FEW, "teacher-at-25") for name in (flow, one, direct)),
    ]
    return Study("instaflow", "small", tuple(items))


def _full() -> Study:
    steps = 300
    teacher = Store("pairs-teacher", TEACHER, 8192, STEPS, GUIDANCE)
    held_out = Store("pairs-held-out", TEACHER, 256, STEPS, GUIDANCE, held_out=True)
    shipped, later = _shipped(teacher)
    return Study(
        "instaflow",
        "full",
        (
            teacher,
            held_out,
            *shipped,
            *_chain("", 0, steps, teacher),
            *(item for seed in SEEDS for item in _chain("paper-", seed, steps, teacher, **REUSE)),
            *_fewer_samples(steps, teacher),
            *_variations(steps, teacher),
            *_teachers(steps),
            *_on_few_pairs(steps),
            *_on_many_pairs(steps, teacher),
            *_further_students(steps, teacher),
            *_on_pictures(steps, teacher),
            *later,
        ),
    )


def _chain(prefix: str, seed: int, steps: int, teacher: Store, **more: Any) -> list[Item]:
    """Reflow, pairs of the result, distillation; and as many samples of direct distillation."""
    flow, one, direct = (f"{prefix}{kind}-{seed}" for kind in ("2rf", "one", "direct"))
    pairs = _reflowed_pairs(flow, 2048)
    reflow = _reflow(steps, seed=seed, **(U_SHAPED if not prefix else {}), **more)
    many = _at(flow, pairs.num_inference_steps, FEW, judged=0)
    rows: list[Item] = [
        _flow(flow),
        *(_flow(name, straight=False) for name in (one, direct)),
        many,
        _at(flow, 1, FEW, "teacher-at-25", judged=0),
        _at(one, 1, FEW, "teacher-at-25", many.name),
        _at(direct, 1, FEW, "teacher-at-25"),
    ]
    return [
        Student(flow, TEACHER, teacher.name, (reflow,)),
        pairs,
        Student(one, flow, pairs.name, (_distill(steps, seed=seed),)),
        Student(direct, TEACHER, teacher.name, (_distill(2 * steps, seed=seed, **more),)),
        *rows,
    ]


def _fewer_samples(steps: int, teacher: Store) -> list[Item]:
    """The paper's recipe with a part of the samples, direct distillation, and what is faster."""
    small: Settings = SMALL_BATCHES | {"falling": 0.6}
    tuned = small | HUBER | {"muon_learning_rate": 1e-3}
    found: list[Item] = []
    for share in SHARES:
        short = steps // share
        found += _short_chain(f"paper-{{}}-of-1-in-{share}", short, teacher)
        found += _short_chain(f"muon-{{}}-of-1-in-{share}", short, teacher, **MUON)
        name = f"muon-reflow-of-1-in-{share}"
        phase = _reflow(2 * short, **REUSE, **U_SHAPED, **MUON)
        found += [Student(name, TEACHER, teacher.name, (phase,)), *_short_rows(name)]
        found += _short_chain(f"small-batch-{{}}-of-1-in-{share}", 4 * short, teacher, **small)
        found += _short_chain(f"tuned-{{}}-of-1-in-{share}", 4 * short, teacher, **tuned)
    return found


def _short_chain(
    named: str, steps: int, teacher: Store, *, falling: float = 0.25, **more: Any
) -> list[Item]:
    """Reflow, distillation and direct distillation; the rate falls over a share of their steps."""
    flow, one, direct = (named.format(kind) for kind in ("2rf", "one", "direct"))
    pairs = _reflowed_pairs(flow, 2048)
    half = more | {"decay_steps": round(falling * steps)}
    whole = REUSE | more | {"decay_steps": round(falling * 2 * steps)}
    return [
        Student(flow, TEACHER, teacher.name, (_reflow(steps, **REUSE, **half),)),
        pairs,
        Student(one, flow, pairs.name, (_distill(steps, **half),)),
        Student(direct, TEACHER, teacher.name, (_distill(2 * steps, **whole),)),
        *_short_rows(one),
        *_short_rows(direct),
    ]


def _short_rows(student: str) -> list[Item]:
    return [_flow(student, straight=False), _at(student, 1, FEW, "teacher-at-25")]


def _variations(steps: int, teacher: Store) -> list[Item]:
    """The paper's reflow with one setting changed."""
    changed: dict[str, Settings] = {
        "start-exact": {"start": "exact"},
        "time-u-shaped": U_SHAPED,
        "time-logit-normal": {"time_law": "logit_normal"},
        "time-grid": {"time_law": "grid"},
        "loss-huber": HUBER,
        "curation-longest": {"drop_longest": 0.1},
        "curation-flip": {"flip": 0.5},
        "coupling-annealed": {"anneal_steps": steps // 2},
        "optimizer-muon": MUON,
        "huber-muon": HUBER | MUON,
    }
    # What those that ship rest on is seen with other seeds as well.
    again = {
        f"{name}-{seed}": changed[name] | {"seed": seed}
        for name in ("huber-muon", "loss-huber", "optimizer-muon")
        for seed in SEEDS[1:]
    }
    return [
        item
        for name, settings in (changed | again).items()
        for item in _varied(name, steps, teacher, settings)
    ]


def _on_few_pairs(steps: int) -> list[Item]:
    """Distillation on 1024 pairs, after reflow and directly, of as many samples as elsewhere.

    Each pair is seen more often, and pictures are less blurred, by direct distillation above all.
    """
    pairs = Store("pairs-1024-of-paper-2rf-0", "paper-2rf-0", 1024, 8, 1.0, "euler")
    one = FEW_PAIRS.format("one-0")
    found: list[Item] = [
        pairs,
        Student(one, "paper-2rf-0", pairs.name, (_distill(steps),)),
        *_short_rows(one),
    ]
    for share in (1, *SHARES):
        name = FEW_PAIRS.format("direct-0" if share == 1 else f"direct-of-1-in-{share}")
        phase = _distill(2 * steps // share, **REUSE)
        found += [Student(name, TEACHER, f"pairs-1024-alpha-{GUIDANCE}", (phase,))]
        found += _short_rows(name)
    return found


def _on_many_pairs(steps: int, teacher: Store) -> list[Item]:
    """Distillation after reflow on as many pairs as direct distillation has."""
    found: list[Item] = []
    for seed in SEEDS:
        flow, one = f"paper-2rf-{seed}", f"many-pairs-one-{seed}"
        pairs = Store(f"pairs-{teacher.num}-of-{flow}", flow, teacher.num, 8, 1.0, "euler")
        phase = _distill(steps, seed=seed)
        found += [pairs, Student(one, flow, pairs.name, (phase,)), *_short_rows(one)]
    return found


def _further_students(steps: int, teacher: Store) -> list[Item]:
    """Students of k steps, stacked ones, and one whose pairs are made on the fly."""
    flow, one = "paper-2rf-0", "paper-one-0"
    pairs = _reflowed_pairs(flow, 2048)
    few: Settings = {"student_steps": [1, 2, 4, 8]}
    stacked: Settings = {"stacked": "separate"}
    online: Settings = {
        "kind": "reflow",
        "num_inference_steps": 8,
        "guidance_scales": [GUIDANCE],
        "solver": "dpmpp",
        "steps": steps // 4,
        "decay_steps": steps // 16,
    }
    return [
        Student("k-step", flow, pairs.name, (_distill(steps, **few),)),
        *(_at("k-step", k, FEW, "teacher-at-25", judged=0) for k in K_STEPS),
        *(_at(one, k, FEW, "teacher-at-25", judged=0) for k in K_STEPS[1:]),
        Student("online", TEACHER, None, (COMMON | REUSE | online,)),
        _flow("online"),
        Student("stacked", flow, pairs.name, (_distill(steps, **stacked),)),
        Student("stacked-direct", TEACHER, teacher.name, (_distill(steps, **REUSE, **stacked),)),
        Student("single-direct", TEACHER, teacher.name, (_distill(steps, **REUSE),)),
        *(_at(name, 1, FEW, "teacher-at-25") for name in STACKING),
    ]


def _varied(name: str, steps: int, teacher: Store, settings: Settings) -> list[Item]:
    phase = _reflow(steps) | REUSE | settings
    return [Student(f"2rf-{name}", TEACHER, teacher.name, (phase,)), _flow(f"2rf-{name}")]


def _on_pictures(steps: int, teacher: Store) -> list[Item]:
    """Reflow by a perceptual loss of decoded pictures, which costs ten times as much a sample."""
    settings: Settings = {
        "loss": "lpips_huber",
        "lpips_weights": "emoji-clip",
        "decode_chunk": 16,
        "steps": steps // 4,
        "decay_steps": steps // 16,
    }
    return _varied("loss-lpips-huber", steps, teacher, settings)


def _teachers(steps: int) -> list[Item]:
    """Reflow on pairs made under another guidance, and on fewer of them."""
    found: list[Item] = []
    for num, alpha in OTHER_PAIRS:
        store = Store(f"pairs-{num}-alpha-{alpha}", TEACHER, num, STEPS, alpha)
        flow = f"2rf-of-{num}-alpha-{alpha}"
        found += [
            store,
            Student(flow, TEACHER, store.name, (_reflow(steps, **REUSE),)),
            _flow(flow),
            _at(flow, 8, FEW, judged=0),
        ]
    return found


def _shipped(teacher: Store) -> tuple[list[Item], list[Item]]:
    """The models that ship, by their own recipe, and direct distillation of as many samples.

    Returns:
        They and their rows; and what can wait, which takes long.
    """
    recipe = {phase.name: phase for phase in get_recipe(SHIPPED).phases}
    plan = recipe["distill"].pairs
    assert plan.num is not None
    pairs = Store(
        "pairs-of-emoji-2rf",
        "emoji-2rf",
        plan.num,
        plan.num_inference_steps,
        plan.guidance_scale,
        plan.solver,
    )

    def trained(name: str, begins: str, store: Store, *phases: str) -> Student:
        return Student(name, begins, store.name, tuple(recipe[phase].settings for phase in phases))

    return [
        trained("emoji-2rf", TEACHER, teacher, "reflow"),
        pairs,
        trained("emoji-instaflow", "emoji-2rf", pairs, "distill"),
        trained("emoji-direct", TEACHER, teacher, "direct"),
        *_rows(),
    ], [
        trained("emoji-instaflow-clip", "emoji-instaflow", pairs, "distill-clip"),
        _at("emoji-instaflow-clip", 1, FEW, "teacher-at-25"),
    ]


def _rows() -> list[Item]:
    """What is measured of the models that ship, beside their teacher."""

    def glimpse(name: str, model: str, steps: int, alpha: float, solver: str | None) -> Pictures:
        return Pictures(name, model, steps, alpha, solver, FEW, judged=0)

    return [
        Flow("flow-teacher", TEACHER, GUIDANCE),
        Flow("flow-teacher-alpha-1", TEACHER, 1.0),
        _flow("emoji-2rf", num=256),
        *(_flow(name, straight=False) for name in ("emoji-instaflow", "emoji-direct")),
        _teacher_at(STEPS, NUM, JUDGED),
        _at("emoji-2rf", STEPS, NUM, "teacher-at-25", judged=JUDGED),
        _at("emoji-instaflow", 1, NUM, "teacher-at-25", "emoji-2rf-at-25", judged=JUDGED),
        _at("emoji-direct", 1, NUM, "teacher-at-25", judged=JUDGED),
        *(_teacher_at(k, FEW, 0) for k in K_STEPS),
        *(
            Pictures(
                f"teacher-{solver}-trailing-at-{k}",
                TEACHER,
                k,
                GUIDANCE,
                solver,
                FEW,
                judged=0,
                spacing="trailing",
            )
            for solver in TRAILING
            for k in (2, 4)
        ),
        *(_at("emoji-2rf", k, FEW, "teacher-at-25", judged=0) for k in K_STEPS),
        *(
            glimpse(f"alpha-{alpha}-at-{steps}", "emoji-2rf", steps, alpha, None)
            for steps in (8, 1)
            for alpha in ALPHAS
        ),
    ]


def _flow(model: str, straight: bool = True, num: int = 128) -> Flow:
    """How straight a model is, and how far few steps end from the teacher's latents."""
    return Flow(f"flow-{model}", model, num=num, pairs="pairs-held-out", straight=straight)
