"""What is edited from: an inversion, given, made from a picture, or of a generated picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from rectiflow.errors import InputError
from rectiflow.invert.inverting import from_seed, invert
from rectiflow.invert.presets import INVERSION_SETTINGS, Preset
from rectiflow.invert.trajectory import Inversion
from rectiflow.models.base import FlowModel
from rectiflow.models.identity import difference
from rectiflow.models.images import Restore, placed
from rectiflow.steer.variants import redrawn


def inverted(
    model: FlowModel,
    image: Image.Image | Inversion | None,
    source_prompt: str | None,
    seed: int | None,
    preset: Preset,
    guidance_scale: float | None,
) -> Inversion:
    """The inversion to edit from: given, made from a picture, or generated.

    Args:
        model: the network.
        image: as `edit` takes it, a file already opened.
        source_prompt: what it shows.
        seed: instead of an image.
        preset: the settings.
        guidance_scale: of the generation from a seed; the model's default when None.

    Raises:
        InputError: none of them is given, or a picture cannot be read.
    """
    if (image is None) == (seed is None):
        raise InputError("give an image or a seed, one of the two")
    if isinstance(image, Inversion):
        return redrawn(image, model, preset.noise_seed)
    if image is not None:
        return invert(model, image, source_prompt, preset=preset)
    assert seed is not None
    if not source_prompt:
        raise InputError("a seed needs a source_prompt: what should be generated and edited?")
    return from_seed(model, source_prompt, seed, preset=preset, guidance_scale=guidance_scale)


def check_reuse(
    inversion: Inversion,
    model: FlowModel,
    source_prompt: str | None,
    settings: Mapping[str, Any],
    preset: Preset | None = None,
) -> None:
    """Refuse what contradicts the inversion that is to be edited from.

    Args:
        inversion: made before.
        model: the network.
        source_prompt: as it was given.
        settings: the fields that were given one by one.
        preset: as it was given; None where the inversion's own is taken.

    Raises:
        InputError: names what was inverted otherwise.
    """
    made_by = inversion.model
    if made_by is not model and (
        made_by.weight_hash != model.weight_hash
        or difference(made_by.identity, model.identity, made_by.name, model.name)
    ):
        raise InputError(
            f"the inversion was made with {made_by.name} and not with {model.name}, whose weights "
            "or settings differ: edit with that model, or invert again"
        )
    if preset is not None:
        preset.inverted_as(inversion.preset).check_path_is_read()
    if preset is not None and preset.scheme != inversion.preset.scheme:
        raise InputError(
            f"the inversion was made by the scheme {inversion.preset.scheme}, and this preset goes "
            f"with {preset.scheme}: invert again with it, or leave preset out"
        )
    made = {"source_prompt": inversion.source_prompt} | {
        name: getattr(inversion.preset, name) for name in INVERSION_SETTINGS
    }
    for name, value in {"source_prompt": source_prompt, **settings}.items():
        if value is not None and name in made and value != made[name]:
            raise InputError(
                f"the inversion was made with {name} {made[name]!r} and not {value!r}: "
                f"leave {name} out, or invert again"
            )


def source_place(model: FlowModel, image: Image.Image | Inversion | None) -> Restore:
    """Where the picture that is to be edited is put for the model, before any work on it.

    Args:
        model: the network.
        image: as `edit` takes it, a file already opened; None for a seed.
    """
    if isinstance(image, Inversion):
        return image.restore
    if image is not None:
        return placed(image.size, model.size_policy)
    size = (model.default_size, model.default_size)
    return Restore(size, size, (0, 0), size)


def prompt_of(image: Image.Image | Inversion | None, source_prompt: str | None) -> str:
    """The source prompt that an edit will go by.

    Args:
        image: as `edit` takes it, a file already opened.
        source_prompt: as it was given.
    """
    return image.source_prompt if isinstance(image, Inversion) else source_prompt or ""
