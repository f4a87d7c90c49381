"""From settings to a task: the model, its pairs or teacher, and whether they belong together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from rectiflow.errors import InputError
from rectiflow.models.base import FlowModel
from rectiflow.models.identity import difference
from rectiflow.models.load import load
from rectiflow.straighten.coupling import Annealed, Coupling, Independent, Piece, StoredPairs
from rectiflow.straighten.curation import Curated, Mixed, PairSource, keep_pairs
from rectiflow.straighten.launched import check_meeting
from rectiflow.straighten.manifest import Manifest
from rectiflow.straighten.online import NoiseAlone, OnlineTeacher, Teacher, Windows
from rectiflow.straighten.order import PairOrder
from rectiflow.straighten.prompt_list import load_prompts
from rectiflow.straighten.reading import PairStore
from rectiflow.straighten.settings import StraightenConfig
from rectiflow.straighten.straightening import StraightenTask
from rectiflow.straighten.student import begin
from rectiflow.straighten.training_record import begun_record, record_of

HELD_OUT = 2**31
"""Number of the first sample that is only looked at, where samples never end."""


def assemble(
    config: StraightenConfig, model: FlowModel | None = None
) -> tuple[StraightenTask, dict[str, Any]]:
    """Everything that a run needs.

    Args:
        config: All settings.
        model: What the student begins as, if it is loaded already; else `config.model` is.

    Returns:
        The task, and what a run that is resumed must find again: the weights and field of the
        model it began as and of its teacher, and what its pairs are.

    Raises:
        InputError: A part is missing, or the parts do not belong together.
    """
    model = loaded(config.model, **config.loaded_with) if model is None else model
    store = None if config.pairs is None else PairStore.open(config.pairs)
    if store is not None:
        check_store(store.manifest, store.uri, model, config.any_teacher)
    student = begin(
        model,
        start=config.start,
        stacked=config.stacked,
        keep_middle=config.keep_middle,
        guidance_embedded=config.guidance_embedded,
        lora=config.lora,
        seed=config.seed,
    )
    teacher = _teacher(config, model) if config.coupling == "online" or config.windows else None
    coupling, held_out = _couplings(config, student, store, teacher)
    identity: dict[str, Any] = {"model": model.weight_hash, "identity": model.identity}
    if store is not None:
        identity["pairs"] = json.loads(store.manifest.to_bytes())
    if teacher is not None:
        identity["teacher"] = teacher.model.weight_hash
        identity["teacher_identity"] = teacher.model.identity
    record = begun_record(identity, model)
    return StraightenTask(config, student, coupling, held_out, record), identity


def loaded(name: str, **told: Any) -> FlowModel:
    """A model in float32, on the device of this process.

    Args:
        name: Of the model.
        **told: Of `load`, beside.
    """
    check_meeting()
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    return load(name, dtype=torch.float32, device=device, **told)


def check_store(manifest: Manifest, uri: str, model: FlowModel, any_teacher: bool = False) -> None:
    """See that a store's pairs are this model's to learn from.

    A student learns from its teacher's pairs, and goes on learning from them: the store's teacher
    must be the model itself, or one that it descends from as its record has it. Its weights decide,
    and what its field is beside them (`FlowModel.identity`) where that is known; not the name.

    Args:
        manifest: Of the store.
        uri: The store's address.
        model: What the student begins as.
        any_teacher: Let another teacher's pairs pass, as long as latents and family fit.

    Raises:
        InputError: They are another family's, another shape's, or another teacher's.
    """
    if manifest.family != model.family:
        raise InputError(
            f"{uri} has pairs of the family {manifest.family} and {model.name} is of "
            f"{model.family}: make pairs with a model of its family"
        )
    shape = model.latent_shape(manifest.height, manifest.width)
    if tuple(manifest.latent_shape) != tuple(shape):
        raise InputError(
            f"{uri} has latents of {list(manifest.latent_shape)} where {model.name} has "
            f"{list(shape)}: make pairs with it, or with a model that has its codec"
        )
    if any_teacher:
        return
    record = record_of(model) or {}
    if manifest.weight_hash in record.get("ancestors", []):
        field, name = record.get("identities", {}).get(manifest.weight_hash, {}), manifest.model
    elif manifest.weight_hash == _hash_in(model, manifest.dtype):
        field, name = model.identity, model.name
    else:
        raise InputError(
            f"{uri} has pairs of {manifest.model} with other weights than those of {model.name} or "
            "of what it descends from: name that teacher with --model, make new pairs, or accept "
            "them with --any-teacher"
        )
    if words := difference(manifest.identity, field, "the store", name):
        raise InputError(
            f"{uri} has pairs of the same weights as another field ({words}): put that back, make "
            "new pairs, or accept them with --any-teacher"
        )


def _hash_in(model: FlowModel, dtype: str) -> str:
    """The weight hash that a model has in another dtype: it is of the weights as loaded."""
    wanted = getattr(torch, dtype)
    if model.dtype == wanted:
        return model.weight_hash
    try:
        return load(model.name, dtype=wanted, device="cpu", **model.loaded_with).weight_hash
    except InputError:  # a model that was made in memory
        return ""


def _teacher(config: StraightenConfig, model: FlowModel) -> Teacher:
    """Who works while the student trains."""
    teacher = model if config.teacher is None else loaded(config.teacher)
    solver = config.solver
    if solver is None:
        solver = "euler" if config.windows else teacher.default_solver
    return Teacher(
        teacher, solver, config.num_inference_steps, config.guidance_scales, config.negative_prompt
    )


def _couplings(
    config: StraightenConfig, student: FlowModel, store: PairStore | None, teacher: Teacher | None
) -> tuple[Coupling, Piece | None]:
    """What is trained on, and what is held out of it."""
    coupling: Coupling
    if store is not None:
        coupling, held_out = _stored(config, student, store)
        if teacher is not None:
            coupling = _windows(config, student, teacher, coupling, noised=True)
    else:
        assert teacher is not None and config.prompts is not None
        coupling, held_out = _online(config, student, teacher)
    if config.coupling == "independent":
        coupling = Independent(coupling, config.seed)
    elif config.anneal_steps:
        samples = config.anneal_steps * config.batch_size
        coupling = Annealed(coupling, config.seed, samples, config.anneal_schedule)
    return coupling, held_out


def _stored(
    config: StraightenConfig, student: FlowModel, store: PairStore
) -> tuple[StoredPairs, Piece | None]:
    keep = keep_pairs(store, config.drop_longest, config.held_out)
    source: PairSource = _curated(config, store, keep)
    if config.real is not None:
        real = PairStore.open(config.real)
        # Whose inversions they are matters less than that the latents are the same codec's.
        check_store(real.manifest, real.uri, student, any_teacher=True)
        source = Mixed(source, _curated(config, real, None), config.real_share, config.seed)
    guidance = store.manifest.guidance_scale
    held_out = None
    if config.held_out:
        readable = np.concatenate([np.arange(r.start, r.stop) for r in store.ranges])
        last: Sequence[int] = readable[-config.held_out :].tolist()
        held_out = StoredPairs(lambda numbers: store.pairs(numbers), guidance)(last)
    return StoredPairs(source.samples, guidance), held_out


def _curated(config: StraightenConfig, store: PairStore, keep: Any) -> Curated:
    order = PairOrder(store, config.seed, config.buffer_shards, keep)
    return Curated(store, order, config.flip, config.seed)


def _online(
    config: StraightenConfig, student: FlowModel, teacher: Teacher
) -> tuple[Coupling, Piece | None]:
    prompts = load_prompts(str(config.prompts))
    height = config.height or student.default_size
    shape = student.latent_shape(height, config.width or height)
    if teacher.model.latent_shape(height, config.width or height) != shape:
        raise InputError(
            f"teacher {teacher.model.name} and {student.name} have latents of different shapes"
        )
    pairs = OnlineTeacher(teacher, prompts, shape, config.seed)
    held_out = None
    if config.held_out:
        held_out = pairs(range(HELD_OUT, HELD_OUT + config.held_out))
    if not config.windows:
        return pairs, held_out
    noise = NoiseAlone(prompts, shape, config.seed)
    return _windows(config, student, teacher, noise, noised=False), held_out


def _windows(
    config: StraightenConfig, student: FlowModel, teacher: Teacher, inner: Coupling, noised: bool
) -> Windows:
    """Between the points at which the student of so many steps will stop."""
    edges = student.student_grid(config.windows)
    return Windows(teacher, edges, inner, config.seed, noised)
