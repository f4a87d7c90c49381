"""One subject in several generated pictures: all from one noise, the first leading the others.

The first picture is generated as ever. The others start from its noise under their own prompts;
in the first steps, in which a layout forms, they attend to the values of the first, and words that
they share with its prompt keep its text features (the controls of FTEdit, arXiv 2411.15843).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from rectiflow.arguments import checked
from rectiflow.errors import InputError
from rectiflow.invert.features import check_controls
from rectiflow.invert.inverting import from_seed
from rectiflow.invert.presets import Preset, get_preset
from rectiflow.models.base import FlowModel
from rectiflow.models.prompts import as_prompts
from rectiflow.steer.edit import edit
from rectiflow.steer.edit_result import EditResult


@dataclass(frozen=True, eq=False)
class ConsistentResult:
    """Pictures of one subject."""

    edit: EditResult
    """The first picture as the source, the others as its edits."""

    @property
    def images(self) -> list[Image.Image]:
        """One per prompt; the first is what the model generates from its prompt alone."""
        return [self.edit.source, *self.edit.images]

    @property
    def prompts(self) -> list[str]:
        """The prompt that leads, and the others."""
        return [self.edit.inversion.source_prompt, *self.edit.prompts]

    @property
    def nfe(self) -> int:
        """Network samples of all pictures."""
        return self.edit.inversion.nfe + self.edit.nfe["total"]

    @property
    def warnings(self) -> list[str]:
        """What is doubtful, in whole sentences."""
        return self.edit.warnings


@checked
def consistent(
    model: FlowModel,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    preset: str | Preset = "subject",
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    **settings: Any,
) -> ConsistentResult:
    """Generate a picture per prompt with the same subject in all of them.

    Args:
        model: from `rectiflow.load`.
        prompts: two or more; the first leads, and what the others say of the subject should be in
            its words.
        seed: of the noise that all of them come from.
        preset: a name of `PRESETS` or a `Preset`.
        guidance_scale: of all pictures; the model's default when None.
        num_inference_steps: likewise.
        height: in pixels; the model's default when None.
        width: likewise.
        **settings: fields of the preset to replace; ``attention_ratio=0.5`` holds more of the
            first picture, ``0.1`` less.

    Raises:
        InputError: there are fewer than two prompts, one is empty, or a setting is wrong.
        WorkError: the network returned something that is not a number.
    """
    given = as_prompts(prompts)
    if len(given) < 2:
        raise InputError("one prompt has nothing to be consistent with: give two or more")
    empty = [number for number, prompt in enumerate(given, 1) if not prompt.strip()]
    if empty:
        raise InputError(f"prompt {empty[0]} is empty: say what the picture shows")
    guidance = model.default_guidance_scale if guidance_scale is None else guidance_scale
    steps = num_inference_steps
    chosen = get_preset(
        preset,
        model.family,
        guidance_scale=guidance,
        num_inference_steps=model.default_num_inference_steps if steps is None else steps,
        **settings,
    )
    check_controls(model, chosen)
    lead = from_seed(
        model,
        given[0],
        seed,
        preset=chosen,
        guidance_scale=guidance,
        height=height,
        width=width,
    )
    return ConsistentResult(edit(model, lead, prompts=given[1:], preset=chosen))
