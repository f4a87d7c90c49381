"""`rectiflow.json`: what a model folder tells us that diffusers' own files have no place for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from rectiflow.errors import InputError

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
    domain: dict[str, Range] | None = None
    """The statistics of images it knows, from and to, by the names of `rectiflow.invert.domain`."""
    licence: str | None = None


def read_metadata(file: Path) -> Metadata:
    """The metadata in a file; all defaults if there is no such file.

    Raises:
        InputError: The file is there and is not valid.
    """
    if not file.is_file():
        return Metadata()
    try:
        return Metadata.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: {where}: {first['msg']}") from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error


def write_metadata(metadata: Metadata, folder: Path) -> None:
    """Write `rectiflow.json` into a model folder, leaving out what is the family's default."""
    text = metadata.model_dump_json(indent=2, exclude_none=True)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
