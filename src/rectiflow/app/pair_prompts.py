"""What ``rectiflow pairs`` makes pairs of: a list of prompts, or images with their captions."""

from __future__ import annotations

import csv
from pathlib import Path

from rectiflow.errors import InputError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def prompts_of(source: str, most: int | None) -> list[str]:
    """The prompts that `--prompts` names.

    Args:
        source: `emoji:COUNT` for captions of the embedded world, those of scenes 0, 1, ...; else as
            in `load_prompts`.
        most: How many can be needed.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    from rectiflow.straighten.prompt_list import load_prompts

    world, colon, count = source.partition(":")
    if world != "emoji" or not colon:
        return load_prompts(source, most)
    if not count.isdecimal() or int(count) < 1:
        raise InputError(f"--prompts {source}: give emoji:COUNT, such as emoji:1000")
    from rectiflow.emoji.caption import caption
    from rectiflow.emoji.scene import sample

    return [caption(sample(seed)) for seed in range(int(count))]


def images_of(source: Path) -> tuple[list[Path], list[str]]:
    """The images that `--images` names, and their captions.

    Args:
        source: A folder of pictures, `a.png` with its caption in `a.txt` beside it, in the order of
            their names; or a CSV file with columns `image` (relative to its folder) and `prompt`,
            `caption` or `text`.

    Raises:
        InputError: There are none, or one has no caption.
    """
    from rectiflow.models.picture import check_image

    if source.is_dir():
        images = sorted(f for f in source.iterdir() if f.suffix.lower() in PICTURES)
        captions = [_beside(image) for image in images]
    else:
        images, captions = _table(source)
    if not images:
        raise InputError(f"{source} has no pictures: give PNG, JPEG, WebP, BMP or TIFF files")
    for image in images:
        if not image.is_file():
            raise InputError(f"{source}: there is no file {image}")
        check_image(image)  # its beginning now, and all of it when its turn comes
    return images, captions


def _beside(image: Path) -> str:
    file = image.with_suffix(".txt")
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{image} has no caption: write one into {file.name}") from error
    if not text:
        raise InputError(f"{file} is empty: write a caption into it")
    return text


def _table(source: Path) -> tuple[list[Path], list[str]]:
    from rectiflow.straighten.prompt_list import load_prompts

    if source.suffix.lower() != ".csv":
        raise InputError(f"--images {source}: give a folder of pictures, or a .csv file")
    if not source.is_file():
        raise InputError(f"there is no file {source}")
    captions = load_prompts(source, blanks=False)  # one for each picture
    with source.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if "image" not in rows[0]:
        raise InputError(f"{source} has no column image: the first line should be image,prompt")
    images = [source.parent / Path(row["image"].strip()).expanduser() for row in rows]
    return images, captions
