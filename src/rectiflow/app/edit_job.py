"""One edit as the command line asks for it, looked at before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from rectiflow.app import options
from rectiflow.app.outputs import Outputs
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.invert import Preset


@dataclass(frozen=True)
class Around:
    """What else `rectiflow.edit` is told, by the names it has there; as JSON data in `asdict`."""

    mask_invert: bool = False
    mask_resize: bool = False
    mask_grow: int = 0
    mask_blur: float = 0.0
    paste_back: bool = False
    crop_to_mask: bool = False
    keep_alpha: bool = False
    windows: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One edit, from its inputs to its folder."""

    image: Path | None
    """A picture, or an inversion saved before; None to edit what `seed` generates."""
    seed: int | None
    source_prompt: str | None
    prompts: list[str]
    negative: str | None
    mask: Path | None
    output: Path
    preset: Preset
    preset_name: str | None
    """As it was asked for."""
    named: list[str]
    """The fields of the preset that were set one by one."""
    around: Around = field(default_factory=Around)
    diagnose: bool = False
    num_images: int = 1
    """Variants of each edit."""
    report: bool = False
    """Whether a picture that `output` names gets a report beside it."""

    @property
    def edits(self) -> int:
        """How many pictures are made."""
        return len(self.prompts) * self.num_images

    @property
    def single(self) -> bool:
        """Whether the output is one picture, and no folder."""
        return options.is_picture(self.output)

    @property
    def folder(self) -> Path:
        """Where what is written goes."""
        return self.output.parent if self.single else self.output

    @property
    def page(self) -> str | None:
        """The name of the report, if there is to be one."""
        if self.single:
            return self.output.with_suffix(".html").name if self.report else None
        return "report.html"

    def outputs(self, overwrite: bool) -> Outputs:
        """Where the files go, known to be free or ours.

        Raises:
            InputError: they are neither.
        """
        names = [self.output.name]
        if not self.single:
            names = [
                "source.png",
                *(f"edit-{number + 1}.png" for number in range(self.edits)),
            ]
            names += ["reconstruction.png"] if self.diagnose else []
        names += [] if self.page is None else [self.page]
        reads = (self.image, self.mask)
        return Outputs(self.folder, names, overwrite=overwrite, reads=reads)

    @property
    def reused(self) -> bool:
        """Whether the image is an inversion."""
        return self.image is not None and self.image.suffix == ".safetensors"


def check_alone(given: Mapping[str, object]) -> None:
    """Refuse what a table of edits says for each, and what is for one edit.

    Raises:
        InputError: names what to leave out.
    """
    named = [name for name, value in given.items() if value not in (None, [], False)]
    if named:
        raise InputError(
            "--batch takes images, prompts, masks and seeds from its file, and masks as they are: "
            f"leave out {', '.join(named)}"
        )


def windows_of(assignments: Sequence[str]) -> dict[str, float]:
    """What ``--window WORD=RATIO`` says.

    Raises:
        InputError: it is not a word and a number.
    """
    windows = {}
    for assignment in assignments:
        word, _, ratio = assignment.rpartition("=")
        try:
            windows[word.strip()] = float(ratio)
        except ValueError:
            word = ""
        if not word.strip():
            raise InputError(f"--window {assignment!r}: give WORD=RATIO, such as apple=0.5")
    return windows


def check(job: Job) -> None:
    """Refuse a job that cannot be, before any work.

    Raises:
        InputError: says what to give.
    """
    if (job.image is None) == (job.seed is None):
        raise InputError("give an image or --seed, one of the two")
    if job.seed is not None and not job.source_prompt:
        raise InputError('--seed needs --from "...": what should be generated and then edited?')
    if job.single and job.edits > 1:
        raise InputError(f"{job.edits} edits do not fit into {job.output}: give a folder with -o")
    if job.report and not job.single:
        raise InputError("--report is for a picture that -o names: a folder has its report anyway")
    if job.around.keep_alpha and job.output.suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(f"-o {job.output} holds no transparency: give a .png or a .webp")


def read(job: Job) -> Image.Image | None:
    """The picture, and a look at the mask before an hour has been spent on inverting.

    Raises:
        InputError: one of them cannot be read, or they do not fit.
    """
    from rectiflow.models.picture import load_image
    from rectiflow.steer.masks import read_mask

    if job.image is None or job.reused:
        return None
    picture = load_image(job.image)
    if job.mask is not None:
        around = job.around
        read_mask(job.mask, picture.size, invert=around.mask_invert, resize=around.mask_resize)
    return picture
