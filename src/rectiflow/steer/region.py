"""Editing a region of a large picture at the model's own size, and putting it back whole."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image, ImageChops

from rectiflow.errors import InputError
from rectiflow.models.images import Restore, SizePolicy
from rectiflow.steer.edit_result import EditResult
from rectiflow.steer.masks import read_mask

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""
CONTEXT = 0.25
"""What is seen around the mask on each side, as a share of its longer side."""


def region_of(mask: Image.Image, policy: SizePolicy) -> Box:
    """Where to cut: what is not black with some context, and no less than the model's own size.

    Args:
        mask: grey, of the picture's size, not black all over.
        policy: the model's.

    Example:
        >>> mask = Image.new("L", (4000, 3000))
        >>> mask.paste(255, (2000, 1000, 2400, 1300))
        >>> region_of(mask, SizePolicy(multiple=16, largest=1536, area=1024 * 1024))
        (1688, 638, 2712, 1662)
    """
    box = mask.getbbox()
    assert box is not None
    lengths = (box[2] - box[0], box[3] - box[1])
    least = math.isqrt(policy.area)
    wanted = [max(length + 2 * CONTEXT * max(lengths), least) for length in lengths]
    wanted = [max(length, max(wanted) / 2) for length in wanted]  # models know no thin strips
    starts, ends = [], []
    for axis, length in enumerate(wanted):
        size = min(math.ceil(length / policy.multiple) * policy.multiple, mask.size[axis])
        middle = (box[axis] + box[axis + 2]) / 2
        start = min(max(0, math.floor(middle - size / 2)), mask.size[axis] - size)
        starts.append(start)
        ends.append(start + size)
    return (starts[0], starts[1], ends[0], ends[1])


def edit_region(
    edit: Callable[..., EditResult],
    picture: Image.Image,
    policy: SizePolicy,
    masked: Mapping[str, Any],
) -> EditResult:
    """Edit a region of a picture, and put it back into it where the mask is not black.

    Where no mask is given, the whole picture is edited first, small, for the masks that come of it.

    Args:
        edit: `rectiflow.edit` with all that it is told besides.
        picture: the whole.
        policy: the model's.
        masked: what it is told of a mask.
    """
    first: EditResult | None = None
    if masked["mask"] is None:
        first = edit(picture, **masked)
        drawn = functools.reduce(ImageChops.lighter, first.masks)
        if drawn.getbbox() is None:
            raise InputError("the derived mask is black all over: lower mask_threshold")
    else:
        around = {
            name.removeprefix("mask_"): value
            for name, value in masked.items()
            if name.startswith("mask_")
        }
        drawn = read_mask(masked["mask"], picture.size, **around)
    box = region_of(drawn, policy)
    result = edit(picture.crop(box), mask=drawn.crop(box), paste_back=True)
    images = []
    for edited in result.images:
        whole = picture.copy()
        whole.paste(edited, box[:2])
        images.append(whole)
    own = result.inversion.restore
    warnings = [text for text in result.warnings if text != size_warning(own)]
    if (text := size_warning(own, "The region")) is not None:
        warnings.append(text)
    found = dataclasses.replace(
        result,
        images=images,
        source=picture,
        masks=[drawn] * len(images),
        region=box,
        warnings=warnings,
    )
    if first is None:
        return found
    return dataclasses.replace(
        found,
        mask_kind=first.mask_kind,
        inversion_nfe=found.inversion_nfe + first.inversion_nfe,
        inversion_seconds=found.inversion_seconds + first.inversion_seconds,
        edit_nfe=found.edit_nfe + first.edit_nfe,
        edit_seconds=found.edit_seconds + first.edit_seconds,
    )


def size_warning(restore: Restore, what: str = "The picture") -> str | None:
    """At which size an edit is made, if that is smaller than what it is made of.

    Args:
        restore: where the picture was put.
        what: to call it.
    """
    width, height = restore.content_size
    if width >= restore.source_size[0]:
        return None
    text = (
        f"{what} is {restore.source_size[0]} × {restore.source_size[1]}, and the edit is made at "
        f"{width} × {height} and enlarged."
    )
    if what != "The picture":
        return text
    return (
        f"{text} With a mask, crop_to_mask (--crop-to-mask) edits its region alone, in more detail."
    )
