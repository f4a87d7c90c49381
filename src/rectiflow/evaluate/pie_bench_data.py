"""PIE-Bench's data: its mapping file, prompts and run-length masks (Ju et al., arXiv 2310.01506).

A folder holds ``mapping_file.json``, an object of id → {image_path, original_prompt,
editing_prompt, editing_instruction, editing_type_id, blended_word, mask}, and the pictures below
``annotation_images/``. The data is its makers'; rectiflow reads it where the user has put it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rectiflow.errors import InputError
from rectiflow.guarded import Missing, Unreadable, parse_json, read_bytes

SIDE = 512
"""Pictures and masks are SIDE × SIDE."""
MAPPING = "mapping_file.json"
PICTURES = "annotation_images"
KINDS = (
    "random",
    "change object",
    "add object",
    "delete object",
    "change content",
    "change pose",
    "change color",
    "change material",
    "change background",
    "change style",
)
"""Of editing_type_id 0 to 9."""


@dataclass(frozen=True)
class PieEdit:
    """One entry of the mapping file."""

    id: str
    number: int
    """Its place in the mapping file, from 0."""
    picture: Path
    """The source's file."""
    path: PurePosixPath
    """The same below `PICTURES`."""
    source_prompt: str
    target_prompt: str
    kind: int
    """A place in `KINDS`."""
    runs: tuple[int, ...]
    """The mask as it is stored."""

    def mask(self) -> NDArray[np.bool_]:
        """Where the edit belongs, bool ``[512, 512]``."""
        return decode_mask(self.runs)


@dataclass(frozen=True)
class PieBench:
    """What is in a data folder."""

    folder: Path
    edits: tuple[PieEdit, ...]
    """In the order of the mapping file."""
    mapping_hash: str
    """SHA-256 of the mapping file."""


def decode_mask(runs: Iterable[int], side: int = SIDE) -> NDArray[np.bool_]:
    """A mask from its runs, bool ``[side, side]``: (start, length) pairs over the rows.

    The outermost rows and columns always belong to the edit, as in the authors' code (the
    annotations are unreliable there), and a run that is too long ends with the picture.

    Example:
        >>> decode_mask([6, 1, 9, 2], side=4).astype(int).tolist()
        [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    flat = np.zeros(side * side, dtype=bool)
    values = iter(runs)
    for start, length in zip(values, values, strict=True):
        flat[start : start + length] = True
    mask = flat.reshape(side, side)
    mask[[0, -1]] = True
    mask[:, [0, -1]] = True
    return mask


def encode_mask(mask: NDArray[np.bool_]) -> list[int]:
    """The runs of a mask, (start, length) pairs over its rows.

    Example:
        >>> encode_mask(np.array([[False, True], [True, False]]))
        [1, 2]
    """
    edges = np.flatnonzero(np.diff(mask.ravel(), prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    return np.stack([starts, ends - starts], axis=1).ravel().tolist()


def read_pie_bench(folder: Path, limit: int | None = None) -> PieBench:
    """Read and check a data folder.

    Args:
        folder: with `MAPPING` and `PICTURES` in it.
        limit: only the first so many entries.

    Raises:
        InputError: something is missing or malformed; the line names it.
    """
    file = folder / MAPPING
    try:
        raw = read_bytes(file)
        mapping = parse_json(raw, file, None)
    except Missing as error:
        raise InputError(
            f"{folder} is no PIE-Bench folder: it has no {MAPPING}; give the folder with "
            f"{MAPPING} and {PICTURES}/ in it"
        ) from error
    except Unreadable as error:
        raise InputError(f"{error}: download it again") from error
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{file} is not an object of id → edit: download it again")
    entries = list(mapping.items())[:limit]
    edits = tuple(_entry(folder, number, *entry) for number, entry in enumerate(entries))
    _check_pictures(edits)
    return PieBench(folder, edits, hashlib.sha256(raw).hexdigest())


def _entry(folder: Path, number: int, key: str, entry: Any) -> PieEdit:
    def wrong(what: str) -> InputError:
        return InputError(f"{folder / MAPPING}, entry {key!r}: {what}; download it again")

    if not isinstance(entry, dict):
        raise wrong("is not an object")
    for name in ("image_path", "original_prompt", "editing_prompt"):
        if not isinstance(entry.get(name), str):
            raise wrong(f"{name} is not a text")
    # Results are written to the same path below another folder.
    path = PurePosixPath(entry["image_path"])
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise wrong(f"image_path {entry['image_path']!r} leaves {PICTURES}/")
    kind = str(entry.get("editing_type_id"))
    if kind not in map(str, range(len(KINDS))):
        raise wrong(f"editing_type_id is {kind!r} and not 0 to {len(KINDS) - 1}")
    runs = entry.get("mask")
    if (
        not isinstance(runs, list)
        or len(runs) % 2
        or any(type(run) is not int or run < 0 for run in runs)
    ):
        raise wrong("mask is not a list of (start, length) pairs")
    return PieEdit(
        id=key,
        number=number,
        picture=folder / PICTURES / path,
        path=path,
        source_prompt=_plain(entry["original_prompt"]),
        target_prompt=_plain(entry["editing_prompt"]),
        kind=int(kind),
        runs=tuple(runs),
    )


def _plain(prompt: str) -> str:
    """A prompt without the brackets that mark what an edit changes."""
    return prompt.replace("[", "").replace("]", "")


def _check_pictures(edits: tuple[PieEdit, ...]) -> None:
    """See that every picture is there and of its size, before hours are spent on the first ones."""
    results: dict[PurePosixPath, str] = {}
    for edit in edits:
        other = results.setdefault(edit.path.with_suffix(""), edit.id)
        if other != edit.id:
            raise InputError(f"{MAPPING}: entries {other!r} and {edit.id!r} share a picture's name")
        try:
            with Image.open(edit.picture) as image:
                size = image.size
        except FileNotFoundError as error:
            raise InputError(
                f"the picture {edit.picture} of entry {edit.id!r} is missing: unpack all of "
                f"{PICTURES}/ there"
            ) from error
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(
                f"{edit.picture} cannot be read as a picture: unpack it again"
            ) from error
        if size != (SIDE, SIDE):
            raise InputError(
                f"{edit.picture} is {size[0]} × {size[1]}: PIE-Bench's pictures and masks are "
                f"{SIDE} × {SIDE}"
            )
