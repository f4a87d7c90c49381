"""The editor: one image, one inversion, any number of target prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.invert.diagnosis import Diagnosis, diagnosis_of
from rectiflow.invert.features import check_controls
from rectiflow.invert.preset import METHOD_FIELDS
from rectiflow.invert.presets import DEFAULT_PRESET, Preset, get_preset, method_name
from rectiflow.invert.trajectory import Inversion
from rectiflow.models.base import FlowModel
from rectiflow.models.images import load_image
from rectiflow.models.prompts import as_prompts
from rectiflow.report import Alignment as WordAlignment
from rectiflow.report import EditEntry, EditReport, Noise
from rectiflow.steer.alignment import Alignment, align
from rectiflow.steer.attention_mask import changed_tokens
from rectiflow.steer.editing import edit_latents
from rectiflow.steer.masks import (
    check_mask_size,
    drawn_mask,
    latent_mask,
    pasted,
    picture_masks,
)
from rectiflow.steer.source import check_reuse, inverted, prompt_of, source_size
from rectiflow.steer.task import EditTask, StepCallback
from rectiflow.steer.warnings import edit_warnings, unknown_image
from rectiflow.steer.windows import check_windows, word_steps

MaskKind = Literal["none", "given", "velocity", "attention"]


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
    mask_kind: MaskKind
    """Whether a mask was given, or what it was derived from."""
    masks: list[Image.Image] = field(repr=False)
    """The masks in the picture's pixels, grey, one per result; empty without."""
    paste_back: bool
    """Whether the source's pixels were pasted back, into `images` alone."""
    windows: Mapping[str, float]
    edit_nfe: int
    """Network samples of the editing alone."""
    edit_seconds: float
    reused: bool
    """Whether `inversion` was given, so that this edit has not paid for it."""
    diagnosis: Diagnosis | None = field(repr=False)
    """If it was asked for."""
    warnings: list[str]

    @property
    def nfe(self) -> dict[str, int]:
        """Network samples that this edit has spent: an inversion that was given costs it none.

        ``inversion``, ``editing``, ``reconstruction`` (what the diagnosis took) and ``total``.
        """
        spent = {
            "inversion": 0 if self.reused else self.inversion.nfe,
            "editing": self.edit_nfe,
            "reconstruction": self.diagnosis.nfe if self.diagnosis else 0,
        }
        return spent | {"total": sum(spent.values())}

    @property
    def seconds(self) -> dict[str, float]:
        """Likewise."""
        spent = {
            "inversion": 0.0 if self.reused else self.inversion.seconds,
            "editing": self.edit_seconds,
            "reconstruction": self.diagnosis.seconds if self.diagnosis else 0.0,
        }
        return spent | {"total": sum(spent.values())}

    def edit_report(
        self,
        *,
        command: str = "",
        title: str = "Edit",
        kind: str = "",
        targets: Sequence[Image.Image | None] = (),
        environment: Mapping[str, object] | None = None,
    ) -> EditReport:
        """This result as the plain data of a report.

        Args:
            command: what made it.
            title: heading of the page.
            kind: what sort of edit it is, when that is known.
            targets: the true results, where they are known.
            environment: where and when it was made.
        """
        inversion = self.inversion
        returned: dict[str, Any] = {}
        if self.diagnosis is not None:
            inversion, exact = self.diagnosis.inversion, self.diagnosis.reconstruction
            returned = {
                "reconstruction": exact.image,
                "uncompensated": self.diagnosis.uncompensated.image,
                "codec": inversion.images(inversion.latents)[0],
                "compensation": exact.compensation.tolist(),
            }
        known = list(targets) or [None] * len(self.images)
        masks: list[Image.Image | None] = [*self.masks] or [None] * len(self.images)
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
                mask=np.asarray(mask) >= 128 if mask else None,
            )
            for prompt, image, target, alignment, mask in zip(
                self.prompts,
                self.images,
                known,
                self.alignments,
                masks,
                strict=True,
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
            settings=dataclasses.asdict(self.preset)
            | {"mask": self.mask_kind, "paste_back": self.paste_back}
            | ({"windows": dict(self.windows)} if self.windows else {}),
            command=command,
            times=inversion.grid.tolist(),
            residuals=inversion.residuals,
            noise=None
            if noise is None
            else Noise(noise.norm, noise.kurtosis, noise.autocorrelation),
            nfe_inversion=self.nfe["inversion"],
            nfe_editing=self.nfe["editing"],
            nfe_reconstruction=self.nfe["reconstruction"],
            seconds_inversion=self.seconds["inversion"],
            seconds=self.seconds["total"],
            warnings=self.warnings,
            environment=environment or {},
            kind=kind,
            **returned,
        )


def edit(
    model: FlowModel,
    image: str | Path | Image.Image | Inversion | None = None,
    *,
    prompts: str | Sequence[str],
    source_prompt: str | None = None,
    negative_prompt: str | None = None,
    preset: str | Preset | None = None,
    mask: str | Path | Image.Image | None = None,
    mask_grow: int = 0,
    mask_blur: float = 0.0,
    paste_back: bool = False,
    windows: Mapping[str, float] | None = None,
    seed: int | None = None,
    diagnose: bool = False,
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
        negative_prompt: what guidance pushes away from; has no effect without guidance.
        preset: a name of `PRESETS` or a `Preset`; when None, that of the `Inversion` that is
            given, else `DEFAULT_PRESET`.
        mask: white where the edit may change the picture, grey where it may somewhat; of the
            picture's size. Without one, ``mask_threshold`` derives one.
        mask_grow: pixels by which the white of `mask` spreads.
        mask_blur: standard deviation in pixels of a Gaussian that softens its edges afterwards.
        paste_back: give the results the source's own pixels, to the bit, where the mask is black,
            and mix them where it is grey.
        windows: words or phrases that stay, and the share of the steps over which each of them is
            held to what it is in the source; `adaln_ratio` for all others.
        seed: instead of an image: edit what the model generates from this seed and
            `source_prompt`, under its own guidance unless ``guidance_scale`` is given too.
        diagnose: also take the image to its noise and back, with and without compensation
            (`EditResult.diagnosis`): as many network samples again, and counted.
        callback_on_step_end: called after each step of the editing.
        **settings: fields of the preset to replace, such as ``guidance_scale=2.0``.

    Raises:
        InputError: an image, prompt or setting is wrong.
        WorkError: the network returned something that is not a number.
    """
    reused = isinstance(image, Inversion)
    if preset is None:
        preset = image.preset if isinstance(image, Inversion) else DEFAULT_PRESET
    chosen = get_preset(preset, model.family, **settings)
    if isinstance(image, Inversion):
        check_reuse(image, model, source_prompt, settings)
        chosen = chosen.inverted_as(image.preset)
        chosen.check_inversion_prompt()
        chosen.check_path_is_read()
    targets = as_prompts(prompts)
    # Whatever is wrong is found before the work.
    check_controls(model, chosen, windows=bool(windows))
    if isinstance(image, str | Path | Image.Image):
        image = load_image(image)
    drawn = None
    if mask is not None:
        drawn = load_image(mask)
        check_mask_size(drawn, source_size(model, image))
        drawn = drawn_mask(drawn, mask_grow, mask_blur)
    elif mask_grow or mask_blur:
        raise InputError("mask_grow and mask_blur change a mask that is given: give one")
    if paste_back:
        _check_paste_back(image, drawn is not None, chosen)
    alignments = [align(model, prompt_of(image, source_prompt), target) for target in targets]
    token_maps = torch.stack([alignment.token_map for alignment in alignments])
    held = None
    if windows:
        check_windows(windows, chosen)
        held = word_steps(model, targets, token_maps, windows, chosen)
    inversion = inverted(model, image, source_prompt, seed, chosen, settings.get("guidance_scale"))
    warnings = edit_warnings(inversion, targets, negative_prompt, chosen)
    started = time.perf_counter()
    words = [
        changed_tokens(model, inversion.source_prompt, target, token_map)
        for target, token_map in zip(targets, token_maps, strict=True)
    ]
    cells = None
    if drawn is not None:
        fitted = inversion.restore.fit_mask(drawn)
        cells = latent_mask(fitted, inversion.latents.shape).to(model.device)
    task = EditTask(
        path=inversion.source_path,
        grid=inversion.grid,
        source=model.encode_prompt([inversion.source_prompt]),
        target=model.encode_prompt(targets),
        owners=(0,) * len(targets),
        token_maps=token_maps,
        negative=None if negative_prompt is None else model.encode_prompt([negative_prompt]),
        mask=cells,
        token_steps=held,
        changed=torch.stack([changed for changed, _ in words]),
        deleted=torch.stack([deleted for _, deleted in words]),
    )
    edited = edit_latents(model, task, chosen, callback_on_step_end)
    if not torch.isfinite(edited.latents).all():
        raise WorkError(f"{model.name} returned numbers that are not finite in {model.dtype}")
    source = inversion.picture or inversion.images(inversion.latents)[0]
    images = inversion.images(edited.latents)
    masks: list[Image.Image] = []
    kind: MaskKind = "none"
    if drawn is not None:
        masks, kind = [drawn] * len(images), "given"
    elif edited.mask is not None:
        masks, kind = picture_masks(edited.mask, inversion.restore), chosen.mask_from
    if paste_back:
        pairs = zip(images, masks, strict=True)
        images = [pasted(image, source, mask) for image, mask in pairs]
    seconds = time.perf_counter() - started
    diagnosis = diagnosis_of(inversion) if diagnose else None
    if diagnosis is not None and diagnosis.inversion is not inversion:
        warnings += unknown_image(diagnosis.inversion)
    return EditResult(
        images=images,
        prompts=targets,
        inversion=inversion,
        preset=chosen,
        source=source,
        latents=edited.latents,
        alignments=alignments,
        mask=None if edited.mask is None else edited.mask.cpu().numpy(),
        mask_kind=kind,
        masks=masks,
        paste_back=paste_back,
        windows=dict(windows or {}),
        edit_nfe=edited.nfe,
        edit_seconds=seconds,
        reused=reused,
        diagnosis=diagnosis,
        warnings=warnings,
    )


def _check_paste_back(image: Image.Image | Inversion | None, given: bool, preset: Preset) -> None:
    """Refuse pasting back where there is no mask, or nothing to paste."""
    derived = preset.mask_threshold and "mask_threshold" in METHOD_FIELDS[preset.method]
    if not (given or derived):
        raise InputError("paste_back needs a mask: give one, or mask_threshold to derive one")
    if isinstance(image, Inversion) and image.picture is None and image.seed is None:
        raise InputError(
            "paste_back needs the picture, which this inversion does not hold: give it"
        )
