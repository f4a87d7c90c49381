"""COCO captions: which pictures are drawn, and from which captions (Lin et al., arXiv 1405.0312).

A folder holds ``annotations/captions_val2017.json`` or ``annotations/captions_val2014.json``, with
``{"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}``, and the
pictures below ``val2017/`` or ``val2014/``. Of each picture the *first* caption counts, the one of
the lowest annotation id. The data is its makers'; rectiflow reads it where the user has put it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from rectiflow.errors import InputError
from rectiflow.guarded import Unreadable, parse_json, read_bytes

SPLITS = ("val2017", "val2014")
DRAWN = {"val2014": 30_000}
"""Pictures that are drawn from a split (`draw_ids`); of another split all are listed."""


@dataclass(frozen=True)
class CocoImage:
    """One picture of the list."""

    id: int
    number: int
    """Its place in the list, from 0."""
    picture: Path
    caption: str
    """In one line: white space is made single spaces."""
    occurrence: int = 1
    """Which of its rows in a list that has the picture more than once."""

    @property
    def name(self) -> str:
        """Of the picture that is drawn."""
        return f"{self.id}" if self.occurrence == 1 else f"{self.id}-{self.occurrence}"


@dataclass(frozen=True)
class Coco:
    """What is in a data folder: the pinned list of pictures, or its beginning."""

    folder: Path
    split: str
    selection: str
    """How the list came about."""
    images: tuple[CocoImage, ...]
    list_hash: str
    """Of the whole list, ids and captions, whatever `first` has left of it."""

    @property
    def ids_hash(self) -> str:
        """SHA-256 of the ids in decimal, each with a newline."""
        return _lines_hash(str(image.id) for image in self.images)

    @property
    def captions_hash(self) -> str:
        """SHA-256 of the captions in UTF-8, each with a newline."""
        return _lines_hash(image.caption for image in self.images)

    def first(self, n: int | None) -> Coco:
        """The same with the first n pictures only, all if None."""
        return dataclasses.replace(self, images=self.images[:n])


def draw_ids(ids: Iterable[int], n: int) -> list[int]:
    """N ids in the order of the SHA-256 of their decimal digits.

    A draw without a generator: the same on every machine, with every version of every library, and
    the first m of it are the draw of m.

    Example:
        >>> draw_ids(range(10), 3)
        [9, 8, 4]
    """
    return sorted(ids, key=lambda i: hashlib.sha256(str(i).encode()).digest())[:n]


def read_coco(
    folder: Path,
    split: str | None = None,
    ids: Sequence[int] | None = None,
    captions: Sequence[tuple[int, str]] | None = None,
) -> Coco:
    """Read and check a data folder.

    The list of val2017 is all pictures in the order of their ids (COCO-2017-5k); that of val2014
    is `draw_ids` of 30 000 (COCO-2014-30k); other ids can be given, in the order they are to have.

    Args:
        folder: with ``annotations/`` and the pictures in it.
        split: one of `SPLITS`; the one that is there if None.
        ids: the list itself.
        captions: the list with its captions, (image id, caption) each; the folder's own are not
            looked at, and its annotations need not be there.

    Raises:
        InputError: something is missing or malformed; the line names it.
    """
    if captions is not None:
        return _listed(folder, split, captions)
    split = _split(folder) if split is None else split
    file = _captions(folder, split)
    names, first = _read(file)
    if ids is not None:
        chosen, selection = list(ids), "given"
        unknown = next((i for i in chosen if i not in names), None)
        if unknown is not None:
            raise InputError(f"{file} has no image {unknown}: correct the list of ids")
    elif split in DRAWN:
        chosen = draw_ids(names, DRAWN[split])
        whole = "" if len(chosen) == DRAWN[split] else f" (there are only {len(chosen)})"
        selection = f"the first {DRAWN[split]} in the order of sha256(id){whole}"
    else:
        chosen, selection = sorted(names), "all in the order of ids"
    silent = next((i for i in chosen if i not in first), None)
    if silent is not None:
        raise InputError(f"{file}: image {silent} has no caption; leave it out with --ids")
    images = tuple(
        CocoImage(i, number, folder / split / names[i], first[i]) for number, i in enumerate(chosen)
    )
    return _checked(folder, split, selection, images)


def _listed(folder: Path, split: str | None, captions: Sequence[tuple[int, str]]) -> Coco:
    """The pictures of a list that brings its captions along."""
    there = [one for one in SPLITS if (folder / one).is_dir()] if split is None else [split]
    if len(there) != 1:
        what = "both" if there else "neither"
        raise InputError(f"{folder} has {what} of val2017/ and val2014/: choose with --split")
    (split,) = there
    # 000000000139.jpg, COCO_val2014_000000000042.jpg
    files = {
        int(digits): file
        for file in sorted((folder / split).glob("*"))
        if (digits := file.stem.rpartition("_")[2]).isascii() and digits.isdigit()
    }
    seen: Counter[int] = Counter()
    images = []
    for number, (i, caption) in enumerate(captions):
        if i not in files:
            raise InputError(f"{folder / split} has no picture of image {i}: correct --captions")
        seen[i] += 1
        images.append(CocoImage(i, number, files[i], caption, seen[i]))
    return _checked(folder, split, "given with captions", tuple(images))


def _checked(folder: Path, split: str, selection: str, images: tuple[CocoImage, ...]) -> Coco:
    for image in images:
        if image.occurrence == 1:
            _check_picture(image)
    lines = (f"{image.id} {image.caption}" for image in images)
    return Coco(folder, split, selection, images, _lines_hash(lines))


def _split(folder: Path) -> str:
    found = [split for split in SPLITS if _captions(folder, split).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder} has captions of {' and '.join(found)}: choose with --split")
    if not found:
        raise InputError(
            f"{folder} is no COCO folder: it has no annotations/captions_val2017.json; give the "
            "folder with annotations/ and val2017/ in it"
        )
    return found[0]


def _captions(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"captions_{split}.json"


def _read(file: Path) -> tuple[dict[int, PurePosixPath], dict[int, str]]:
    """Image id → file name, and image id → first caption."""
    try:
        data = parse_json(read_bytes(file, 2**28), file, None)
    except Unreadable as error:
        raise InputError(f"{error}: unpack COCO's annotations there again") from error
    names: dict[int, PurePosixPath] = {}
    for entry in _entries(file, data, "images", {"id": int, "file_name": str}):
        path = PurePosixPath(entry["file_name"])
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise InputError(f"{file}: file_name {str(path)!r} leaves the folder of pictures")
        if entry["id"] in names:
            raise InputError(f"{file}: image {entry['id']} is there twice; download it again")
        names[entry["id"]] = path
    if not names:
        raise InputError(f"{file} lists no images: download it again")
    wanted = {"id": int, "image_id": int, "caption": str}
    first: dict[int, tuple[int, str]] = {}
    for entry in _entries(file, data, "annotations", wanted):
        found = (entry["id"], " ".join(entry["caption"].split()))
        known = first.setdefault(entry["image_id"], found)
        first[entry["image_id"]] = min(known, found)
    return names, {image: caption for image, (_, caption) in first.items()}


def _entries(file: Path, data: Any, what: str, wanted: dict[str, type]) -> list[dict[str, Any]]:
    entries = data.get(what) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{file} has no list {what!r}: give COCO's captions_*.json")
    for number, entry in enumerate(entries):
        for key, kind in wanted.items():
            if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
                raise InputError(f"{file}: {key} of {what}[{number}] is missing or malformed")
    return entries


def _check_picture(image: CocoImage) -> None:
    """See that a picture is there and is one, before hours are spent on the first ones."""
    try:
        with Image.open(image.picture):
            pass
    except FileNotFoundError as error:
        raise InputError(
            f"the picture {image.picture} of image {image.id} is missing: unpack all of "
            f"{image.picture.parent.name}/ there"
        ) from error
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{image.picture} cannot be read as a picture: unpack it again") from error


def _lines_hash(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()
