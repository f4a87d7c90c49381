"""What an edit gives: the pictures, how they came about, what they cost, and their report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rectiflow.invert.diagnosis import Diagnosis
from rectiflow.invert.domain import usual_of
from rectiflow.invert.presets import Preset, method_name
from rectiflow.invert.trajectory import Inversion
from rectiflow.models.picture import load_image
from rectiflow.report import Alignment as WordAlignment
from rectiflow.report import EditEntry, EditReport, Noise
from rectiflow.steer.alignment import Alignment

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
    inversion_nfe: int
    """Network samples paid for inverting: 0 where the inversion was given."""
    inversion_seconds: float
    """Likewise."""
    diagnosis: Diagnosis | None = field(repr=False)
    """If it was asked for."""
    warnings: list[str]
    noise_seeds: list[int] = field(default_factory=list)
    """Of each variant, where several were asked for."""
    region: tuple[int, int, int, int] | None = None
    """What was cut out and edited alone, by ``crop_to_mask``: left, top, right, bottom. `latents`,
    `mask` and `inversion` are of it, the pictures of the whole."""

    @property
    def variants(self) -> int:
        """How many pictures there are of each prompt, one after the other."""
        return len(set(self.noise_seeds)) or 1

    @property
    def nfe(self) -> dict[str, int]:
        """Network samples that this edit has spent: an inversion that was given costs it none.

        ``inversion``, ``editing``, ``reconstruction`` (what the diagnosis took) and ``total``.
        """
        spent = {
            "inversion": self.inversion_nfe,
            "editing": self.edit_nfe,
            "reconstruction": self.diagnosis.nfe if self.diagnosis else 0,
        }
        return spent | {"total": sum(spent.values())}

    @property
    def seconds(self) -> dict[str, float]:
        """Likewise."""
        spent = {
            "inversion": self.inversion_seconds,
            "editing": self.edit_seconds,
            "reconstruction": self.diagnosis.seconds if self.diagnosis else 0.0,
        }
        return spent | {"total": sum(spent.values())}

    def placed(self, picture: Image.Image) -> Image.Image:
        """A picture of the region in its place in the source; itself where all was edited."""
        if self.region is None:
            return picture
        whole = load_image(self.source)
        whole.paste(picture, self.region[:2])
        return whole

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
                "reconstruction": self.placed(exact.image),
                "uncompensated": self.placed(self.diagnosis.uncompensated.image),
                "codec": self.placed(inversion.images(inversion.latents)[0]),
                "compensation": exact.compensation.tolist(),
            }
        known = list(targets) or [None] * len(self.images)
        masks: list[Image.Image | None] = [*self.masks] or [None] * len(self.images)
        entries = [
            EditEntry(
                prompt=prompt,
                image=load_image(image),  # on white
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
            source=load_image(self.source),
            edits=entries,
            source_prompt=inversion.source_prompt,
            settings=dataclasses.asdict(self.preset)
            | {"mask": self.mask_kind, "paste_back": self.paste_back}
            | ({"windows": dict(self.windows)} if self.windows else {})
            | ({"noise_seeds": self.noise_seeds} if self.noise_seeds else {})
            | ({"region": self.region} if self.region else {}),
            command=command,
            times=inversion.grid.tolist(),
            residuals=inversion.residuals,
            noise=None
            if noise is None
            else Noise(noise.norm, noise.kurtosis, noise.autocorrelation, usual_of(inversion)),
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
