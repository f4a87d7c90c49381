"""Editing in turns: each turn edits what the turn before it left, and the drift is measured.

Turns hand on latents, so that no turn but the first goes through the codec. What a chain loses
against editing the original straight to the same prompt is its drift.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rectiflow.arguments import checked
from rectiflow.errors import InputError
from rectiflow.invert.inverting import from_latents
from rectiflow.invert.presets import Preset
from rectiflow.invert.trajectory import Inversion
from rectiflow.models.base import FlowModel
from rectiflow.models.picture import Picture, load_image
from rectiflow.models.prompts import as_prompts
from rectiflow.report.pictures import pixels, psnr
from rectiflow.report.sheet import contact_sheet
from rectiflow.steer.edit import edit
from rectiflow.steer.masks import read_mask
from rectiflow.steer.region import size_warning
from rectiflow.steer.source import source_place

SMALLEST = 192
"""Pictures of a contact sheet are enlarged to at least about this many pixels."""


@dataclass(frozen=True)
class Distances:
    """How near a picture is to others, PSNR in dB; infinite where equal, None where unknown."""

    source: float
    """To the source, as the codec gives it."""
    target: float | None = None
    """To the true result."""
    outside: float | None = None
    """To the source where the mask is black."""


@dataclass(frozen=True, eq=False)
class Turn:
    """One edit of a chain."""

    prompt: str
    image: Image.Image
    latents: Tensor = field(repr=False)
    """``[1, C, h, w]``, float32."""
    distances: Distances
    max_abs_latent: float
    """Largest difference from the latents of the source."""
    returns: bool
    """Whether the prompt is the one the chain began with."""
    nfe: dict[str, int]
    """Network samples of this turn, as `EditResult.nfe` has them."""
    seconds: float
    one_shot: Image.Image | None = None
    """The original edited straight to this prompt."""
    one_shot_distances: Distances | None = None
    drift: float | None = None
    """PSNR in dB between `image` and `one_shot`; infinite where they are equal."""


@dataclass(frozen=True, eq=False)
class ChainResult:
    """A chain of edits."""

    source: Image.Image
    """The picture that was edited first."""
    inversion: Inversion
    """Of the source."""
    preset: Preset
    turns: list[Turn]
    one_shot_nfe: int
    """Network samples spent on one-shot edits alone, to compare with."""
    warnings: list[str]
    """Those of the first turn, and what each later one adds."""

    @property
    def images(self) -> list[Image.Image]:
        """A picture per turn, at the source's size."""
        return [turn.image for turn in self.turns]

    @property
    def prompts(self) -> list[str]:
        """The source's prompt, then those of the turns."""
        return [self.inversion.source_prompt, *(turn.prompt for turn in self.turns)]

    @property
    def returned(self) -> list[Turn]:
        """The turns that went back to the first prompt, and should be near the source."""
        return [turn for turn in self.turns if turn.returns]

    @property
    def nfe(self) -> dict[str, int]:
        """Network samples: those of all turns, as `EditResult.nfe` has them, and ``one_shot``."""
        parts = ("inversion", "editing", "reconstruction")
        spent = {part: sum(turn.nfe[part] for turn in self.turns) for part in parts}
        spent["one_shot"] = self.one_shot_nfe
        return spent | {"total": sum(spent.values())}

    @property
    def seconds(self) -> float:
        """Of all turns; one-shot edits are not counted."""
        return sum(turn.seconds for turn in self.turns)

    def sheet(self) -> Image.Image:
        """The source and all turns in a row, above them what one shot gives where it is known."""
        shown = [(self.source, "source")]
        shown += [(turn.image, f"turn {n}: {turn.prompt}") for n, turn in enumerate(self.turns, 1)]
        if all(turn.one_shot is not None for turn in self.turns):
            shown.append((self.source, "source"))
            for number, turn in enumerate(self.turns, 1):
                assert turn.one_shot is not None
                shown.append((turn.one_shot, f"one shot {number}: {turn.prompt}"))
        return contact_sheet(
            [pixels(image) for image, _ in shown],
            columns=len(self.turns) + 1,
            scale=max(1, math.ceil(SMALLEST / max(self.source.size))),
            captions=[caption for _, caption in shown],
        )


@checked
def edit_chain(
    model: FlowModel,
    image: Picture | Inversion | None = None,
    *,
    prompts: str | Sequence[str],
    negative_prompt: str | None = None,
    preset: str | Preset | None = None,
    mask: Picture | None = None,
    mask_invert: bool = False,
    mask_resize: bool = False,
    seed: int | None = None,
    one_shot: bool = True,
    targets: Sequence[Image.Image | None] = (),
    **settings: Any,
) -> ChainResult:
    """Edit a picture turn by turn, each turn from the latents of the turn before it.

    Turn k inverts what turn k − 1 left under the prompt that made it, and edits that to its own.

    Args:
        model: from `rectiflow.load`.
        image: as `edit` takes it.
        prompts: what the image shows now, then a prompt per turn; the first again at the end shows
            whether a chain comes back.
        negative_prompt: as `edit` takes it, of every turn.
        preset: as `edit` takes it.
        mask: as `edit` takes it, of every turn.
        mask_invert: as `edit` takes it.
        mask_resize: as `edit` takes it.
        seed: instead of an image: edit what the model generates from this seed and the first
            prompt.
        one_shot: also edit the original straight to every prompt, and measure the drift.
        targets: the true result of each turn where it is known, of the source's size.
        **settings: fields of the preset to replace.

    Raises:
        InputError: there is no turn, a prompt is empty, or as `edit`.
        WorkError: the network returned something that is not a number.
    """
    first, *rest = _checked(prompts)
    image = image if image is None or isinstance(image, Inversion) else load_image(image)
    size = source_place(model, image).source_size
    _check_targets(targets, len(rest), size)
    drawn = None
    if mask is not None:
        drawn = read_mask(mask, size, invert=mask_invert, resize=mask_resize)
    elif mask_invert or mask_resize:
        raise InputError("without a mask there is nothing to invert or to resize: give one")
    black = None if drawn is None else np.asarray(drawn) == 0
    again = functools.partial(edit, model, negative_prompt=negative_prompt, mask=drawn)
    result = again(
        image, source_prompt=first, prompts=rest[0], preset=preset, seed=seed, **settings
    )
    original, source, chosen = result.inversion, result.source, result.preset
    codec = original.images(original.latents)[0]
    straight = {rest[0]: result.images[0]}
    turns: list[Turn] = []
    small, said = (size_warning(original.restore, what) for what in ("The picture", "The image"))
    warnings = [said if said and text == small else text for text in result.warnings]
    extra = 0
    known = list(targets) or [None] * len(rest)
    for before, prompt, target in zip([first, *rest], rest, known, strict=False):
        if turns:  # each pays for an inversion of its own
            inversion = from_latents(
                model, turns[-1].latents, original.restore, before, preset=chosen
            )
            result = again(inversion, prompts=prompt, preset=chosen)
            result = dataclasses.replace(
                result, inversion_nfe=inversion.nfe, inversion_seconds=inversion.seconds
            )
            new = [text for text in result.warnings if text not in warnings]
            warnings += [f"Turn {len(turns) + 1}: {text}" for text in new]
        if one_shot and prompt not in straight:
            shot = again(original, prompts=prompt, preset=chosen)
            straight[prompt] = shot.images[0]
            extra += shot.edit_nfe
        picture, other = result.images[0], straight[prompt] if one_shot else None
        turns.append(
            Turn(
                prompt=prompt,
                image=picture,
                latents=result.latents,
                distances=_distances(picture, codec, target, black),
                max_abs_latent=(result.latents - original.latents).abs().max().item(),
                returns=prompt == first,
                nfe=result.nfe,
                seconds=result.seconds["total"],
                one_shot=other,
                one_shot_distances=None
                if other is None
                else _distances(other, codec, target, black),
                drift=None if other is None else psnr(picture, other),
            )
        )
    return ChainResult(source, original, chosen, turns, extra, warnings)


def _checked(prompts: Sequence[str]) -> list[str]:
    """The prompts of a chain."""
    given = as_prompts(prompts)
    if len(given) < 2:
        raise InputError(
            f"a chain of {len(given)} prompt: give what the image shows, then a prompt per turn"
        )
    for number, prompt in enumerate(given):
        if not prompt.strip():
            which = "the source" if number == 0 else f"turn {number}"
            raise InputError(f"the prompt of {which} is empty: say what the image shows then")
    return given


def _check_targets(
    targets: Sequence[Image.Image | None], turns: int, size: tuple[int, int]
) -> None:
    if targets and len(targets) != turns:
        raise InputError(f"{len(targets)} targets for {turns} turns: give one each, or None")
    for target in targets:
        if target is not None and target.size != size:
            raise InputError(f"a target is {target.size} and the image {size}: give it that size")


def _distances(
    image: Image.Image,
    source: Image.Image,
    target: Image.Image | None,
    black: NDArray[np.bool_] | None,
) -> Distances:
    outside = None
    if black is not None and black.any():
        difference = pixels(image)[black] - pixels(source)[black]
        error = float(np.square(difference, dtype=np.float64).mean())
        outside = math.inf if error == 0 else -10 * math.log10(error)
    return Distances(
        source=psnr(image, source),
        target=None if target is None else psnr(image, target),
        outside=outside,
    )
