"""The editor: one image, one inversion, any number of target prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.invert.inverting import from_seed, invert
from rectiflow.invert.presets import INVERSION_SETTINGS, Preset, get_preset, method_name
from rectiflow.invert.trajectory import Inversion, Reconstruction
from rectiflow.models.base import FlowModel
from rectiflow.models.images import load_image
from rectiflow.models.prompts import as_prompts
from rectiflow.report import Alignment as WordAlignment
from rectiflow.report import EditEntry, EditReport, Noise
from rectiflow.steer.alignment import Alignment, align
from rectiflow.steer.editing import edit_latents
from rectiflow.steer.masks import latent_mask
from rectiflow.steer.task import EditTask, StepCallback
from rectiflow.steer.warnings import edit_warnings


@dataclass(frozen=True, eq=False)
class EditResult:
    """Edited pictures and how they came about."""

    images: list[Image.Image]
    """One per target prompt, at the source's size."""
    prompts: list[str]
    inversion: Inversion
    preset: Preset
    source: Image.Image
    """The picture that was edited."""
    latents: Tensor = field(repr=False)
    """``[T, C, h, w]``, float32."""
    alignments: list[Alignment] = field(repr=False)
    mask: NDArray[np.float32] | None = field(repr=False)
    """The mask that was given or derived, ``[1 or T, 1, h, w]``; None without."""
    edit_nfe: int
    """Network samples of the editing alone."""
    edit_seconds: float
    warnings: list[str]

    @property
    def nfe(self) -> dict[str, int]:
        """Network samples: of the inversion, of editing, and of both."""
        inversion = self.inversion.nfe
        return {
            "inversion": inversion,
            "editing": self.edit_nfe,
            "total": inversion + self.edit_nfe,
        }

    def edit_report(
        self,
        *,
        reconstruction: tuple[Reconstruction, Reconstruction] | None = None,
        command: str = "",
        title: str = "Edit",
        kind: str = "",
        targets: Sequence[Image.Image | None] = (),
        environment: Mapping[str, object] | None = None,
    ) -> EditReport:
        """This result as the plain data of a report.

        Args:
            reconstruction: with and without compensation; computed when None.
            command: what made it.
            title: heading of the page.
            kind: what sort of edit it is, when that is known.
            targets: the true results, where they are known.
            environment: where and when it was made.
        """
        inversion = self.inversion
        exact, plain = reconstruction or (inversion.reconstruct(), inversion.reconstruct(False))
        known = list(targets) or [None] * len(self.images)
        entries = [
            EditEntry(
                prompt=prompt,
                image=image,
                target=target,
                alignment=WordAlignment(
                    source=alignment.source_words,
                    target=alignment.target_words,
                    kept=alignment.kept,
                ),
                nfe=self.edit_nfe // len(self.images),
                seconds=self.edit_seconds / len(self.images),
            )
            for prompt, image, target, alignment in zip(
                self.prompts, self.images, known, self.alignments, strict=True
            )
        ]
        noise = inversion.noise_statistics
        return EditReport(
            title=title,
            model=inversion.model.name,
            preset=method_name(self.preset),
            source=self.source,
            edits=entries,
            source_prompt=inversion.source_prompt,
            reconstruction=exact.image,
            uncompensated=plain.image,
            codec=inversion.images(inversion.latents)[0],
            settings=dataclasses.asdict(self.preset),
            command=command,
            times=inversion.grid.tolist(),
            residuals=inversion.residuals,
            compensation=exact.compensation.tolist(),
            noise=noise and Noise(noise.norm, noise.kurtosis, noise.autocorrelation),
            nfe_inversion=inversion.nfe,
            nfe_editing=self.edit_nfe,
            seconds_inversion=inversion.seconds,
            seconds=inversion.seconds + self.edit_seconds,
            warnings=self.warnings,
            environment=environment or {},
            kind=kind,
        )


def edit(
    model: FlowModel,
    image: str | Path | Image.Image | Inversion | None = None,
    *,
    prompts: str | Sequence[str],
    source_prompt: str | None = None,
    negative_prompt: str | None = None,
    preset: str | Preset = "exact",
    mask: str | Path | Image.Image | None = None,
    seed: int | None = None,
    callback_on_step_end: StepCallback | None = None,
    **settings: Any,
) -> EditResult:
    """Edit an image by changing its prompt, keeping what the prompt did not change.

    Args:
        model: from `rectiflow.load`.
        image: a file, a picture of any size, or an `Inversion` made before, which is reused with
            the settings it was made with.
        prompts: what the image should show instead; each gives one result.
        source_prompt: what it shows now; the empty prompt when None.
        negative_prompt: what guidance pushes away from; has no effect at guidance 1.
        preset: a name of `PRESETS` or a `Preset`.
        mask: white where the edit may change the picture; of the picture's size.
        seed: instead of an image: edit what the model generates from this seed and
            `source_prompt`.
        callback_on_step_end: called after each step of the editing.
        **settings: fields of the preset to replace, such as ``guidance_scale=2.0``.

    Raises:
        InputError: an image, prompt or setting is wrong.
        WorkError: the network returned something that is not a number.
    """
    chosen = get_preset(preset, **settings)
    if isinstance(image, Inversion):
        _check_reuse(image, model, source_prompt, settings)
        chosen = chosen.inverted_as(image.preset)
    targets = as_prompts(prompts)
    drawn = None if mask is None else load_image(mask)  # a bad file is found before the work
    inversion = _inverted(model, image, source_prompt, seed, chosen)
    warnings = edit_warnings(inversion, targets, negative_prompt, chosen)
    started = time.perf_counter()
    alignments = [align(model, inversion.source_prompt, target) for target in targets]
    cells = None
    if drawn is not None:
        fitted = inversion.restore.fit_mask(drawn)
        cells = latent_mask(fitted, inversion.latents.shape).to(model.device)
    task = EditTask(
        path=inversion.path,
        grid=inversion.grid,
        source=model.encode_prompt([inversion.inverted_prompt]),
        target=model.encode_prompt(targets),
        owners=(0,) * len(targets),
        token_maps=torch.stack([alignment.token_map for alignment in alignments]),
        negative=model.encode_prompt([negative_prompt or ""]),
        mask=cells,
    )
    edited = edit_latents(model, task, chosen, callback_on_step_end)
    if not torch.isfinite(edited.latents).all():
        raise WorkError(f"{model.name} returned numbers that are not finite in {model.dtype}")
    source = load_image(image) if isinstance(image, str | Path | Image.Image) else None
    return EditResult(
        images=inversion.images(edited.latents),
        prompts=targets,
        inversion=inversion,
        preset=chosen,
        source=source or inversion.images(inversion.latents)[0],
        latents=edited.latents,
        alignments=alignments,
        mask=None if edited.mask is None else edited.mask.cpu().numpy(),
        edit_nfe=edited.nfe,
        edit_seconds=time.perf_counter() - started,
        warnings=warnings,
    )


def _inverted(
    model: FlowModel,
    image: str | Path | Image.Image | Inversion | None,
    source_prompt: str | None,
    seed: int | None,
    preset: Preset,
) -> Inversion:
    """The inversion to edit from: given, made from a picture, or generated."""
    if (image is None) == (seed is None):
        raise InputError("give an image or a seed, one of the two")
    if isinstance(image, Inversion):
        return image
    if image is not None:
        return invert(model, image, source_prompt, preset=preset)
    assert seed is not None
    if not source_prompt:
        raise InputError("a seed needs a source_prompt: what should be generated and edited?")
    return from_seed(model, source_prompt, seed, preset=preset)


def _check_reuse(
    inversion: Inversion, model: FlowModel, source_prompt: str | None, settings: Mapping[str, Any]
) -> None:
    """Refuse what contradicts the inversion that is to be edited from."""
    if inversion.model is not model and inversion.model.weight_hash != model.weight_hash:
        raise InputError(
            f"the inversion was made with {inversion.model.name} and not with {model.name}, whose "
            "weights differ: edit with that model, or invert again"
        )
    made = {"source_prompt": inversion.source_prompt} | {
        name: getattr(inversion.preset, name) for name in INVERSION_SETTINGS
    }
    for name, value in {"source_prompt": source_prompt, **settings}.items():
        if value is not None and name in made and value != made[name]:
            raise InputError(
                f"the inversion was made with {name} {made[name]!r} and not {value!r}: "
                f"leave {name} out, or invert again"
            )
