"""The emoji benchmark of editing: fixed edits whose right answer is known to the pixel.

Every method inverts the same pictures and edits them towards the same prompts; what it makes is
compared with the true target. Differences between methods are paired per edit: the spread between
edits is ten times the difference between methods.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rectiflow._version import __version__
from rectiflow.emoji.edits import KINDS, EditCase, sample_edit
from rectiflow.errors import InputError, WorkError
from rectiflow.evaluate.edit_parts import Made, Part, read_part, write_part
from rectiflow.evaluate.edit_scores import CLIP_METRICS, METRICS, masks, pictures, score
from rectiflow.evaluate.emoji_models import Clip
from rectiflow.evaluate.metrics import psnr
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.presets import PRESETS, TWINS, Preset, get_preset, on_family
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.prompts import Conditioning
from rectiflow.models.weights import weight_hash
from rectiflow.progress import progress
from rectiflow.steer.alignment import align
from rectiflow.steer.editing import edit_latents
from rectiflow.steer.masks import latent_mask
from rectiflow.steer.task import EditTask

TUNING_SEED = 1_000_000
REPORTED_SEED = 2_000_000
PER_KIND = 20
BATCH = 20
REFERENCES = ("nothing", "bound")
"""The source through the codec, and the true target through the codec."""

Masks = Literal["none", "given"]
"""Whether methods are told where the edit belongs. A mask changes more than a method does, so
figures of the one kind are never put beside those of the other."""


def cases(limit: int | None = None, first_seed: int = REPORTED_SEED) -> list[EditCase]:
    """The benchmark's edits, kind after kind in turn, so that any first n are balanced.

    Args:
        limit: how many; 20 of each kind when None.
        first_seed: reported figures use 2 000 000 and above, tuning 1 000 000 and above.
    """
    wanted = PER_KIND * len(KINDS) if limit is None else limit
    seeds = range(first_seed, first_seed + -(-wanted // len(KINDS)))
    return [sample_edit(kind, seed) for seed in seeds for kind in KINDS][:wanted]


def methods_for(model: FlowModel) -> list[str]:
    """All presets for real pictures; of those published for several families, the model's."""
    twins = {twin for family in TWINS.values() for twin in family.values()}
    return [on_family(name, model.family) for name in PRESETS if name not in twins | {"subject"}]


@torch.no_grad()
def invert_cases(
    model: FlowModel, batch: Sequence[EditCase], preset: Preset, masked: Masks = "none"
) -> EditTask:
    """Invert the sources of a batch of cases by a preset; what is left is to edit them."""
    latents = model.encode_image(pictures([case.source for case in batch]))
    grid = grid_for(model, preset, latents)
    source = model.encode_prompt([case.source_prompt for case in batch])
    field = GuidedVelocity(model, _inverted_under(model, source, preset))
    seeds = tuple(case.seed for case in batch)
    alignments = [align(model, case.source_prompt, case.target_prompt) for case in batch]
    mask = None
    if masked == "given":
        mask = latent_mask(masks(batch).float(), latents.shape).to(model.device)
    path = invert_latents(field, latents, grid, preset, seeds=seeds)
    return EditTask(
        path=path if preset.inversion_prompt == "source" else path.under_another_prompt(),
        grid=grid,
        source=source,
        target=model.encode_prompt([case.target_prompt for case in batch]),
        owners=tuple(range(len(batch))),
        token_maps=torch.stack([alignment.token_map for alignment in alignments]),
        negative=model.encode_prompt([""]),
        mask=mask,
        seeds=seeds,
    )


def _inverted_under(model: FlowModel, source: Conditioning, preset: Preset) -> Conditioning:
    return source if preset.inversion_prompt == "source" else model.encode_prompt("")


@torch.no_grad()
def reconstruction_psnr(model: FlowModel, task: EditTask, preset: Preset) -> Tensor:
    """How well sources come back without compensation, dB against the codec's own: ``[B]``."""
    field = GuidedVelocity(model, _inverted_under(model, task.source, preset))
    solver = SCHEMES[preset.scheme].solver(task.path, task.grid, torch.tensor(task.owners))
    x, memory = task.trajectory[0], None
    for step, (t, t_next) in enumerate(pairwise(task.grid)):
        x, memory = solver.step(field, x, t, t_next, step, memory)
    return psnr(model.decode(x).cpu(), model.decode(task.trajectory[-1]).cpu())


@dataclass(frozen=True)
class Benchmark:
    """A model before the benchmark's edits, and where results are kept."""

    model: FlowModel
    folder: Path | None = None
    """Of finished parts; None keeps nothing."""
    clip: Clip | None = None
    """Adds CLIP_METRICS."""
    first_seed: int = REPORTED_SEED
    batch_size: int = BATCH
    masks: Masks = "none"
    reconstruct: bool = False
    """Adds `reconstruction_psnr`, of every edit's inversion."""

    def made(self, method: str | Preset) -> Made:
        """What results of a method depend on."""
        with_clip = CLIP_METRICS if self.clip else ()
        conditions = {
            "version": __version__,
            "weight_hash": self.model.weight_hash,
            "clip_hash": weight_hash({"clip": self.clip.model}) if self.clip else None,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "first_seed": self.first_seed,
            "batch_size": self.batch_size,
            "masks": self.masks,
            "reconstruct": self.reconstruct,
            "metrics": [*METRICS, *with_clip],
        }
        return Made(method, conditions)

    def run(self, edits: Sequence[EditCase], method: str | Preset, name: str) -> Part:
        """The results of a method, one per edit; those that were kept are not made again.

        Args:
            edits: the first of the benchmark's, in order.
            method: a preset, or one of REFERENCES.
            name: what to call it: in its file's name, and in progress.

        Raises:
            InputError: a file of results is damaged.
            WorkError: the network returned something that is not a number.
        """
        made = self.made(method)
        file = made.file(self.folder, name) if self.folder else None
        part = read_part(made, file) if file else None
        if part is not None and len(part) >= len(edits):
            return part.first(len(edits))
        # A last batch that was not full is made again, in the company it always has.
        whole = len(part) // self.batch_size * self.batch_size if part else 0
        part = part.first(whole) if part and whole else None
        for batch in self._batches(edits, whole, name):
            more = self._run(batch, method, name)
            part = more if part is None else part.plus(more)
            if file:
                write_part(part, made, file)
        assert part is not None
        return part

    def _run(self, batch: Sequence[EditCase], method: str | Preset, name: str) -> Part:
        started = time.perf_counter()
        more: dict[str, Any] = {}
        if isinstance(method, str):
            if method not in REFERENCES:
                raise InputError(f"{method!r} is no reference; one of: {', '.join(REFERENCES)}")
            shown = [case.source if method == "nothing" else case.target for case in batch]
            images = self._decode(self.model.encode_image(pictures(shown)))
            nfe = np.zeros(len(batch))
        else:
            task = invert_cases(self.model, batch, method, self.masks)
            edited = edit_latents(self.model, task, method)
            images = self._decode(edited.latents)
            nfe = task.path.evaluations.sum(0).double().cpu().numpy() + edited.nfe / len(batch)
            if self.reconstruct:
                back = reconstruction_psnr(self.model, task, method)
                more["reconstruction_psnr"] = back.double().numpy()
        if not torch.isfinite(images).all():
            raise WorkError(f"{name}: {self.model.name} returned numbers that are not finite")
        more["nfe"] = nfe
        more["seconds"] = np.full(len(batch), (time.perf_counter() - started) / len(batch))
        return Part((images * 255).round().byte(), score(images, batch, self.clip) | more)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).float().cpu()

    def _batches(
        self, edits: Sequence[EditCase], first: int, name: str
    ) -> Iterator[Sequence[EditCase]]:
        starts = range(first, len(edits), self.batch_size)
        for start in progress(starts, desc=name, unit="batch", leave=False):
            yield edits[start : start + self.batch_size]


def chosen_methods(
    model: FlowModel, names: Sequence[str] | None, tuned: Mapping[str, Mapping[str, Any]]
) -> dict[str, str | Preset]:
    """What is to be compared, by the name of its row.

    Args:
        model: whose family decides what fits when `names` is None.
        names: presets and REFERENCES; both references and `methods_for` when None. A tuned row is
            named as it is called, ``NAME (tuned)``.
        tuned: settings chosen by tuning, by method; adds a row to each that is among the names.

    Raises:
        InputError: there is no such method.
    """
    wanted = [*REFERENCES, *methods_for(model)] if names is None else list(names)
    rows: dict[str, str | Preset] = {}
    for name in wanted:
        method = name.removesuffix(" (tuned)")
        if method in REFERENCES:
            rows[name] = method
        elif method not in PRESETS or (name != method and method not in tuned):
            known = [*REFERENCES, *PRESETS, *(f"{other} (tuned)" for other in tuned)]
            raise InputError(f"no method {name!r}; there are: {', '.join(known)}")
        elif name == method:
            rows[name] = get_preset(method, model.family)
        if method in tuned:
            rows[f"{method} (tuned)"] = get_preset(method, model.family, **tuned[method])
    return rows
