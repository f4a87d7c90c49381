"""From settings to a task: what is trained on, what is held out, and what does not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.models import load
from rectiflow.straighten.assembly import assemble, check_store
from rectiflow.straighten.config import validate
from rectiflow.straighten.manifest import Manifest
from rectiflow.straighten.pair_maker import make_pairs
from rectiflow.straighten.reading import PairStore
from rectiflow.straighten.settings import StraightenConfig
from rectiflow.straighten.training_record import FILE_NAME, read_record, write_record
from tests.tiny_sd import tiny_sd, tiny_sd_model

PROMPTS = ["a red apple", "two cats", "a heart on the left"]
NUM = 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    folder = tmp_path_factory.mktemp("pairs")
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "shard_size": 8, "batch_size": 8}
    make_pairs(tiny_sd_model(), PROMPTS, folder, num=NUM, **given)  # type: ignore[arg-type]
    return PairStore.open(folder)


def settings(store: PairStore, **given: object) -> StraightenConfig:
    defaults = {"model": "tiny-sd", "pairs": store.uri, "held_out": 4, "batch_size": 4}
    return validate(StraightenConfig, defaults | given)


def indices(store: PairStore, x_1: torch.Tensor) -> list[int]:
    """Which pairs these latents are of."""
    every = store.pairs(range(NUM)).x_1
    return [int((every == row).flatten(1).all(1).nonzero()[0]) for row in x_1]


def test_an_epoch_has_every_pair_once_but_those_held_out(store: PairStore) -> None:
    task, identity = assemble(settings(store), tiny_sd_model())
    seen = indices(store, task.coupling(range(16)).x_1)
    assert sorted(seen) == list(range(16)) and seen != sorted(seen)
    assert task.probe is not None
    assert indices(store, task.probe.piece.x_1) == [16, 17, 18, 19]
    assert identity["model"] == store.manifest.weight_hash
    assert identity["pairs"]["base_seed"] == 0


def test_curation_is_part_of_the_coupling(store: PairStore) -> None:
    task, _ = assemble(settings(store, drop_longest=0.25), tiny_sd_model())
    seen = set(indices(store, task.coupling(range(12)).x_1))
    costs = store.costs()[:16]
    assert seen == set(costs.argsort()[:12].tolist())
    plain, _ = assemble(settings(store), tiny_sd_model())
    flipped, _ = assemble(settings(store, flip=1.0), tiny_sd_model())
    a, b = plain.coupling(range(16)), flipped.coupling(range(16))
    for row, prompt in enumerate(a.prompts):
        mirror = "left" not in prompt
        for x, y in ((a.x_0, b.x_0), (a.x_1, b.x_1)):
            assert torch.equal(x[row].flip(-1) if mirror else x[row], y[row])
    mixed, _ = assemble(settings(store, real=store.uri, real_share=0.5), tiny_sd_model())
    assert len(mixed.coupling(range(8)).prompts) == 8


def test_flow_matching_has_noise_of_its_own_and_annealing_both(store: PairStore) -> None:
    pairs, _ = assemble(settings(store), tiny_sd_model())
    given = {"kind": "flow_matching"}
    free, _ = assemble(settings(store, **given), tiny_sd_model())
    a, b = pairs.coupling(range(8)), free.coupling(range(8))
    assert torch.equal(a.x_1, b.x_1) and not torch.isclose(a.x_0, b.x_0).any(1).all()
    annealed, _ = assemble(settings(store, anneal_steps=2), tiny_sd_model())
    c = annealed.coupling(range(8, 10))
    assert torch.equal(c.x_0, pairs.coupling(range(8, 10)).x_0)


def test_noised_windows_are_of_the_stores_latents(store: PairStore) -> None:
    given = {"windows": 2, "windows_from": "noised", "guidance_scales": [1.0]}
    task, _ = assemble(settings(store, **given), tiny_sd_model())
    batch = task.batch(range(4))
    edges = task.student.student_grid(2)
    assert bool(((batch["t"] >= edges[0]) & (batch["t"] <= edges[2])).all())
    loss = task.network(**batch)
    loss.mean().backward()
    assert loss.shape == (4,) and bool(loss.isfinite().all())


def test_a_guidance_embedded_student_is_told_the_stores_scale(store: PairStore) -> None:
    task, _ = assemble(settings(store, guidance_embedded=True), tiny_sd_model())
    assert task.batch(range(2))["cond_guidance"].tolist() == [3.0, 3.0]
    plain, _ = assemble(settings(store), tiny_sd_model())
    assert "cond_guidance" not in plain.batch(range(2))


@pytest.mark.parametrize("kind", ["reflow", "distill", "flow_matching"])
@pytest.mark.parametrize("start", ["exact", "reuse"])
def test_every_kind_trains_on_every_start(store: PairStore, kind: str, start: str) -> None:
    config = settings(store, kind=kind, start=start, student_steps=[1, 2])
    task, _ = assemble(config, tiny_sd_model())
    task.enable_gradient_checkpointing()
    batch = task.batch(range(3))
    assert bool((batch["x"][0] != 0).any()) and batch["target"].shape == batch["x"].shape
    task.network(**batch).mean().backward()
    moved = [p.grad is not None and bool(p.grad.any()) for p in task.network.parameters()]
    assert sum(moved) > 0.7 * len(moved)


def changed(manifest: Manifest, **changes: object) -> Manifest:
    return manifest.model_copy(update=changes)


def test_pairs_of_another_teacher_are_refused(store: PairStore, tmp_path: Path) -> None:
    manifest = store.manifest
    check_store(manifest, "here", tiny_sd_model())
    other = tiny_sd_model(seed=1)
    with pytest.raises(InputError, match="--any-teacher"):
        check_store(manifest, "here", other)
    check_store(manifest, "here", other, any_teacher=True)
    with pytest.raises(InputError, match="family flux"):
        check_store(changed(manifest, family="flux"), "here", other, any_teacher=True)
    with pytest.raises(InputError, match=r"latents of \[16, 8, 8\]"):
        shape = changed(manifest, latent_shape=(16, 8, 8))
        check_store(shape, "here", other, any_teacher=True)


def test_a_students_ancestors_are_its_teachers(store: PairStore, tmp_path: Path) -> None:
    tiny_sd(seed=1).save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match="other weights"):
        check_store(store.manifest, "here", load(tmp_path / "student", device="cpu"))
    write_record({"ancestors": [store.manifest.weight_hash]}, tmp_path / "student")
    student = load(tmp_path / "student", device="cpu")
    check_store(store.manifest, "here", student)
    (tmp_path / "student" / FILE_NAME).write_text("[]")
    with pytest.raises(InputError, match="holds a list and not"):
        read_record(tmp_path / "student")
    assert read_record(tmp_path) is None


def test_the_dtype_of_the_pairs_does_not_make_another_teacher(tmp_path: Path) -> None:
    """Hashes are of weights as loaded: those in bfloat16 are compared with those in bfloat16."""
    tiny_sd().save_pretrained(tmp_path / "m")
    half = load(tmp_path / "m", dtype=torch.bfloat16, device="cpu")
    given = {"num_inference_steps": 1, "guidance_scale": 1.0}
    make_pairs(half, PROMPTS, tmp_path / "pairs", num=3, **given)  # type: ignore[arg-type]
    manifest = PairStore.open(tmp_path / "pairs").manifest
    whole = load(tmp_path / "m", device="cpu")
    assert whole.weight_hash != manifest.weight_hash
    check_store(manifest, "here", whole)
