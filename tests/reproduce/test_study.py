"""The shape of a study, and of InstaFlow's at both sizes."""

from __future__ import annotations

import pytest

from rectiflow.models.load import embedded_models
from rectiflow.reproduce.instaflow import SEEDS, SHARES, SHIPPED, TEACHER, instaflow
from rectiflow.reproduce.study import CLIP, Flow, Item, Pictures, Settings, Store, Student, Study
from rectiflow.straighten.config import validate
from rectiflow.straighten.recipes import get_recipe
from rectiflow.straighten.settings import StraightenConfig

SIZES = ("small", "full")
STUDIES = {"small": instaflow("small"), "full": instaflow("full")}
PHASE: Settings = {"kind": "reflow", "steps": 3, "batch_size": 5}


def toy() -> Study:
    """A chain of two, something beside it, and rows of each."""
    return Study(
        "toy",
        "small",
        (
            Store("pairs", "m", 8),
            Student("flow", "m", "pairs", (PHASE,)),
            Store("more", "flow", 8),
            Student("one", "flow", "more", (PHASE, PHASE | {"steps": 2})),
            Student("beside", "m", None, (PHASE,)),
            Pictures("teacher-at-2", "m", 2),
            Pictures("one-at-1", "one", 1, against=("teacher-at-2",)),
            Flow("flow-one", "one", pairs="pairs"),
        ),
    )


def student(study: Study, name: str) -> Student:
    found = study.item(name)
    assert isinstance(found, Student), name
    return found


def test_two_items_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two items are called a$"):
        Study("toy", "small", (Store("a", "m", 1), Store("b", "m", 1), Flow("a", "m")))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["pairs"], ["pairs"]),
        (["more"], ["pairs", "flow", "more"]),
        (["teacher"], ["teacher-at-2"]),
        (["one"], ["pairs", "flow", "more", "one"]),
        (["on"], ["pairs", "flow", "more", "one", "teacher-at-2", "one-at-1"]),
        (["be"], ["beside"]),
        (["flow"], ["pairs", "flow"]),
        (["flow-"], ["pairs", "flow", "more", "one", "flow-one"]),
        (["teacher-at-2", "pairs", "pairs"], ["pairs", "teacher-at-2"]),
    ],
)
def test_only_some_and_what_they_need(wanted: list[str], found: list[str]) -> None:
    assert [item.name for item in toy().only(wanted)] == found


def test_only_of_nothings_beginning_names_it() -> None:
    with pytest.raises(KeyError) as raised:
        toy().only(["flow", "wrong"])
    assert raised.value.args == ("wrong",)


def test_items_by_name_and_their_samples() -> None:
    study = toy()
    assert study.item("m") is None
    assert student(study, "flow").samples == 3 * 5
    assert student(study, "one").samples == 3 * 5 + 2 * 5


@pytest.mark.parametrize("size", SIZES)
def test_every_need_comes_before_or_is_a_model_that_ships(size: str) -> None:
    seen: set[str] = set()
    for item in STUDIES[size].items:
        assert set(item.needs) - seen <= {*embedded_models(), CLIP}, item.name
        seen.add(item.name)


@pytest.mark.parametrize("size", SIZES)
def test_needs_are_of_the_right_kind(size: str) -> None:
    study = STUDIES[size]

    def is_model(name: str) -> bool:
        return name == TEACHER or isinstance(study.item(name), Student)

    for item in study.items:
        match item:
            case Store(teacher=model):
                assert is_model(model)
            case Student(begins=model, pairs=pairs):
                assert is_model(model)
                assert pairs is None or isinstance(study.item(pairs), Store)
            case Flow(model=model, pairs=pairs):
                assert is_model(model)
                assert pairs is None or _held_out(study, pairs)
                assert item.straight or pairs is not None, f"{item.name} measures nothing"
            case Pictures(model=model, against=against):
                assert is_model(model)
                for name in against:
                    other = study.item(name)
                    assert isinstance(other, Pictures)
                    assert other.num >= min(item.num, 1000), f"{item.name} against {name}"


def _held_out(study: Study, name: str) -> bool:
    store = study.item(name)
    return isinstance(store, Store) and store.held_out


@pytest.mark.parametrize("size", SIZES)
def test_nobody_trains_on_held_out_pairs(size: str) -> None:
    study = STUDIES[size]
    trained_on = {item.pairs for item in study.items if isinstance(item, Student)}
    for name in trained_on - {None}:
        assert name is not None and not _held_out(study, name)


@pytest.mark.parametrize("size", SIZES)
def test_every_phase_is_a_valid_configuration(size: str) -> None:
    students = [item for item in STUDIES[size].items if isinstance(item, Student)]
    assert students
    for item in students:
        assert item.phases
        for phase in item.phases:
            source = {"pairs": "p"} if item.pairs else {"prompts": "p"}
            config = validate(StraightenConfig, {"model": "m"} | source | phase)
            assert config.kind == phase["kind"]


@pytest.mark.parametrize("size", SIZES)
def test_a_student_and_its_baseline_see_the_same_number_of_samples(size: str) -> None:
    study = STUDIES[size]
    full = size == "full"
    chains = [(f"paper-{{}}-{seed}", seed) for seed in (SEEDS if full else SEEDS[:1])]
    if full:
        chains += [("{}-0", 0), *((f"paper-{{}}-of-1-in-{share}", 0) for share in SHARES)]
    for named, seed in chains:
        flow, one, direct = (student(study, named.format(k)) for k in ("2rf", "one", "direct"))
        assert one.begins == flow.name and direct.begins == flow.begins == TEACHER
        assert flow.samples + one.samples == direct.samples > 0
        assert {p.get("seed", 0) for s in (flow, one, direct) for p in s.phases} == {seed}
        assert direct.phases[0]["start"] == flow.phases[0]["start"]


def test_the_shipped_student_and_direct_distillation_see_the_same_number_of_samples() -> None:
    flow, one, direct = (
        student(STUDIES["full"], name) for name in ("emoji-2rf", "emoji-instaflow", "emoji-direct")
    )
    assert flow.samples + one.samples == direct.samples > 0
    assert one.begins == flow.name and direct.begins == flow.begins == TEACHER
    assert direct.pairs == flow.pairs


def test_single_and_stacked_students_see_the_same_number_of_samples() -> None:
    study = STUDIES["full"]
    assert student(study, "stacked").samples == student(study, "paper-one-0").samples
    assert student(study, "stacked").pairs == student(study, "paper-one-0").pairs
    direct, single = student(study, "stacked-direct"), student(study, "single-direct")
    assert direct.samples == single.samples and direct.pairs == single.pairs


def test_the_shipped_students_are_those_of_the_recipe() -> None:
    """Every phase, on the pairs that the recipe says and as many of them."""
    trained = {
        "reflow": "emoji-2rf",
        "distill": "emoji-instaflow",
        "distill-clip": "emoji-instaflow-clip",
        "direct": "emoji-direct",
    }
    recipe = get_recipe(SHIPPED)
    assert [phase.name for phase in recipe.phases] == list(trained)
    for phase in recipe.phases:
        item = student(STUDIES["full"], trained[phase.name])
        assert item.phases == (phase.settings,)
        assert phase.baseline == (item.name not in ("emoji-2rf", "emoji-instaflow"))
        store = STUDIES["full"].item(str(item.pairs))
        assert isinstance(store, Store)
        plan = phase.pairs
        assert trained.get(plan.teacher, plan.teacher) == store.teacher
        assert (plan.num, plan.solver) == (store.num, store.solver)
        assert plan.num_inference_steps == store.num_inference_steps
        assert plan.guidance_scale == store.guidance_scale


def test_single_changes_change_one_thing() -> None:
    """Beside `paper-2rf-0`, a reflow on the same pairs; a costly loss also takes fewer steps."""
    study = STUDIES["full"]
    base = student(study, "paper-2rf-0")
    kinds = ("start", "time", "loss", "curation", "coupling", "optimizer")
    named = tuple(f"2rf-{kind}-" for kind in kinds)
    changed: list[Item] = [i for i in study.items if i.name.startswith(named)]
    assert len(changed) >= 8
    length = {"steps", "decay_steps"}
    for item in changed:
        assert isinstance(item, Student)
        assert (item.begins, item.pairs) == (base.begins, base.pairs)
        (one,), (before,) = item.phases, base.phases
        differ = {key for key in one.keys() | before.keys() if one.get(key) != before.get(key)}
        assert differ - {"seed"}, item.name
        if not length & differ:
            assert item.samples == base.samples
            assert len(differ - {"seed"}) == 1, (item.name, differ)
