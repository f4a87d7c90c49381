"""`rectiflow.json`: what a model folder tells us that diffusers' own files have no place for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from rectiflow.errors import InputError
from rectiflow.guarded import read_json

FILE_NAME = "rectiflow.json"


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"from {ends[0]} to {ends[1]} is empty: the smaller one goes first")
    return ends


Range = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_rising)]
"""From and to."""


class Metadata(BaseModel):
    """How a checkpoint is meant to be used; what is left out is the family's default.

    Example:
        >>> Metadata(max_sequence_length=1).default_guidance_scale is None
        True
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    family: str | None = None
    max_sequence_length: int | None = Field(default=None, gt=0, le=512)
    """T5 positions in the text stream. 512 is the most that diffusers' pipelines accept."""
    default_guidance_scale: float | None = None
    default_num_inference_steps: int | None = Field(default=None, gt=0)
    student_steps: tuple[Annotated[int, Field(gt=0)], ...] | None = None
    """The numbers of steps that a rectified few-step model was made for."""
    default_size: int | None = Field(default=None, gt=0)
    """Side of the square image the model was trained on, in pixels."""
    domain: dict[str, dict[str, dict[int, Range]]] | None = None
    """What is usual of images it knows, from and to: by the inversion scheme, by the statistic's
    name in `rectiflow.invert.domain`, and by the number of steps."""
    knows: str | None = None
    """What it was trained on and therefore knows alone, in a few words."""
    vocabulary: str | None = None
    """The words it was trained on, by spaces, if it knows no others."""
    licence: str | None = None

    def doubt_of_words(self, name: str, prompt: str) -> str | None:
        """Which words of a prompt the model has never seen; None if there are none, or who knows.

        Args:
            name: Of the model.
            prompt: Any text.

        Example:
            >>> Metadata(vocabulary="a red apple").doubt_of_words("toy", "A red tulip")
            "toy does not know the word 'tulip' (`rectiflow models toy` lists those it knows)"
        """
        if self.vocabulary is None:
            return None
        known = {"", *re.split(r"[\W_]+", self.vocabulary)}
        words = dict.fromkeys(re.split(r"[\W_]+", prompt.lower()))
        strange = [repr(word) for word in words if word not in known]
        if not strange:
            return None
        noun = "word" if len(strange) == 1 else "words"
        return (
            f"{name} does not know the {noun} {', '.join(strange)} (`rectiflow models {name}` "
            "lists those it knows)"
        )

    def doubt(self, name: str, num_inference_steps: int, guidance_scale: float) -> str | None:
        """What is wrong with how a student of few steps is used; None if nothing is known to be.

        Args:
            name: Of the model.
            num_inference_steps: In which it is run.
            guidance_scale: α of classifier-free guidance.
        """
        if not self.student_steps:
            return None
        wrong, most = [], max(1.0, self.default_guidance_scale or 1.0)
        if num_inference_steps not in self.student_steps:
            wrong.append(f"{num_inference_steps} steps")
        if guidance_scale > most:
            wrong.append(f"at guidance {guidance_scale:g}")
        if not wrong:
            return None
        steps = ", ".join(map(str, self.student_steps))
        steps += " step" if self.student_steps == (1,) else " steps"
        return (
            f"{name} is made for {steps} at guidance {most:g}, and this is {' '.join(wrong)}: its "
            "pictures get worse that way, not better"
        )


def read_metadata(file: Path) -> Metadata:
    """The metadata in a file; all defaults if there is no such file.

    Raises:
        InputError: The file is there and is not valid.
    """
    if not file.is_file():
        return Metadata()
    try:
        return Metadata.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: {where}: {first['msg']}") from error


def write_metadata(metadata: Metadata, folder: Path) -> None:
    """Write `rectiflow.json` into a model folder, leaving out what is the family's default."""
    text = metadata.model_dump_json(indent=2, exclude_none=True)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
