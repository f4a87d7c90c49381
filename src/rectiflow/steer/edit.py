"""The editor: one image, one inversion, any number of target prompts."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from rectiflow.arguments import checked
from rectiflow.errors import InputError, WorkError
from rectiflow.invert.diagnosis import diagnosis_of
from rectiflow.invert.features import check_controls
from rectiflow.invert.preset import METHOD_FIELDS
from rectiflow.invert.presets import DEFAULT_PRESET, Preset, get_preset
from rectiflow.invert.trajectory import Inversion
from rectiflow.models.base import FlowModel
from rectiflow.models.picture import Picture, load_alpha, load_image, with_alpha
from rectiflow.models.prompts import as_prompts
from rectiflow.steer.alignment import align
from rectiflow.steer.attention_mask import changed_tokens
from rectiflow.steer.each_picture import each_picture
from rectiflow.steer.edit_result import EditResult, MaskKind
from rectiflow.steer.editing import edit_latents
from rectiflow.steer.masks import mask_cells, pasted, picture_masks, read_mask
from rectiflow.steer.region import edit_region
from rectiflow.steer.source import check_reuse, inverted, prompt_of, source_place
from rectiflow.steer.task import EditTask, StepCallback
from rectiflow.steer.variants import check_variants, draws_noise, edit_variants
from rectiflow.steer.warnings import edit_warnings, unknown_image
from rectiflow.steer.windows import check_windows, word_steps


@each_picture
@checked
def edit(
    model: FlowModel,
    image: Picture | Inversion | None = None,
    *,
    prompts: str | Sequence[str],
    source_prompt: str | None = None,
    negative_prompt: str | None = None,
    preset: str | Preset | None = None,
    mask: Picture | None = None,
    mask_invert: bool = False,
    mask_resize: bool = False,
    mask_grow: int = 0,
    mask_blur: float = 0.0,
    paste_back: bool = False,
    crop_to_mask: bool = False,
    keep_alpha: bool = False,
    num_images_per_prompt: int = 1,
    windows: Mapping[str, float] | None = None,
    seed: int | None = None,
    diagnose: bool = False,
    callback_on_step_end: StepCallback | None = None,
    **settings: Any,
) -> EditResult:
    """Edit an image by changing its prompt, keeping what the prompt did not change.

    Args:
        model: from `rectiflow.load`.
        image: a picture of any size: a file, a Pillow image, an array or a tensor (`Picture`).
            Or an `Inversion` made before, which is reused with the settings it was made with.
            A list of them gives a list of results; `mask` and `source_prompt` may be lists then,
            with one for each.
        prompts: what the image should show instead; each gives one result.
        source_prompt: what it shows now; the empty prompt when None.
        negative_prompt: what guidance pushes away from; has no effect without guidance.
        preset: a name of `PRESETS` or a `Preset`; when None, that of the `Inversion` that is
            given, else `DEFAULT_PRESET`.
        mask: white where the edit may change the picture; a grey g lets through the share g of
            the change. A picture as `image` may be, of its size; where it has transparent parts,
            its opacity is the mask. Without one, ``mask_threshold`` derives one.
        mask_invert: the mask is black where the edit may change the picture.
        mask_resize: stretch a mask of another size.
        mask_grow: pixels by which the white of `mask` spreads.
        mask_blur: standard deviation in pixels of a Gaussian that softens its edges afterwards.
        paste_back: give the results the source's own pixels, to the bit, where the mask is black,
            and mix them where it is grey.
        crop_to_mask: edit the region of the mask alone, at the model's own size and with some of
            what is around it, and put it back into the picture, which is pasted back elsewhere.
            For a derived mask, the whole picture is edited first.
        keep_alpha: edit the picture on white, and give the results its transparency.
        num_images_per_prompt: variants of each edit, with noise of `noise_seed`, `noise_seed` + 1,
            … Refused where the scheme and the method draw none.
        windows: words or phrases that stay, and the share of the steps over which each of them is
            held to what it is in the source; `adaln_ratio` for all others.
        seed: instead of an image: edit what the model generates from this seed and
            `source_prompt`, under its own guidance unless ``guidance_scale`` is given too.
        diagnose: also take the image to its noise and back, with and without compensation
            (`EditResult.diagnosis`): as many network samples again, and counted.
        callback_on_step_end: called after each step of the editing.
        **settings: fields of the preset to replace, such as ``guidance_scale=2.0``.

    Raises:
        InputError: an image, prompt or setting is wrong.
        WorkError: the network returned something that is not a number.
    """
    given, wanted = image, preset
    if preset is None:
        preset = image.preset if isinstance(image, Inversion) else DEFAULT_PRESET
    chosen = get_preset(preset, model.family, **settings)
    if isinstance(image, Inversion):
        new = {
            name: value
            for name, value in settings.items()
            if name == "noise_seed" and value is not None
        }
        new = new if draws_noise(image.preset, image.seed is not None) else {}
        told = {**settings, **dict.fromkeys(new)}
        check_reuse(image, model, source_prompt, told, None if wanted is None else chosen)
        chosen = dataclasses.replace(chosen.inverted_as(image.preset), **new)
        chosen.check_inversion_prompt()
        chosen.check_path_is_read()
    generated = image is None or (isinstance(image, Inversion) and image.seed is not None)
    check_variants(num_images_per_prompt, chosen, isinstance(image, Inversion), generated)
    masked: dict[str, Any] = {
        "mask": mask, "mask_invert": mask_invert, "mask_resize": mask_resize,
        "mask_grow": mask_grow, "mask_blur": mask_blur,
    }  # fmt: skip
    again = functools.partial(
        edit, model, prompts=prompts, source_prompt=source_prompt, negative_prompt=negative_prompt,
        preset=preset, windows=windows, seed=seed, callback_on_step_end=callback_on_step_end,
    )  # fmt: skip
    whole = masked | {"paste_back": paste_back, "crop_to_mask": crop_to_mask}
    if keep_alpha:
        alpha = _alpha_of(given)
        many = {"num_images_per_prompt": num_images_per_prompt, "diagnose": diagnose}
        result = again(given, **whole, **many, **settings)
        images = [with_alpha(one, alpha) for one in result.images]
        return dataclasses.replace(result, images=images, source=with_alpha(result.source, alpha))
    if num_images_per_prompt > 1:
        once = functools.partial(again, given, **settings | whole)
        return edit_variants(once, num_images_per_prompt, chosen.noise_seed, diagnose)
    if crop_to_mask:
        once = functools.partial(again, diagnose=diagnose, **settings)
        return edit_region(
            once, _to_be_cut(image, mask is not None, chosen), model.size_policy, masked
        )
    targets = as_prompts(prompts)
    # Whatever is wrong is found before the work.
    check_controls(model, chosen, windows=bool(windows))
    image = image if image is None or isinstance(image, Inversion) else load_image(image)
    drawn = cells = None
    place = source_place(model, image)
    around: dict[str, Any] = {"invert": mask_invert, "resize": mask_resize}
    around |= {"grow": mask_grow, "blur": mask_blur}
    if mask is not None:
        drawn = read_mask(mask, place.source_size, **around)
        cells = mask_cells(drawn, place, model.latent_shape(*place.size[::-1])).to(model.device)
    elif any(around.values()):
        named = ", ".join(f"mask_{name}" for name, value in around.items() if value)
        raise InputError(f"without a mask there is nothing for {named} to change: give one")
    if paste_back:
        _check_paste_back(image, drawn is not None, chosen)
    alignments = [align(model, prompt_of(image, source_prompt), target) for target in targets]
    token_maps = torch.stack([alignment.token_map for alignment in alignments])
    held = None
    if windows:
        check_windows(windows, chosen)
        held = word_steps(model, targets, token_maps, windows, chosen)
    inversion = inverted(model, image, source_prompt, seed, chosen, settings.get("guidance_scale"))
    warnings = edit_warnings(inversion, targets, negative_prompt, chosen)
    started = time.perf_counter()
    words = [
        changed_tokens(model, inversion.source_prompt, target, token_map)
        for target, token_map in zip(targets, token_maps, strict=True)
    ]
    task = EditTask(
        path=inversion.source_path,
        grid=inversion.grid,
        source=model.encode_prompt([inversion.source_prompt]),
        target=model.encode_prompt(targets),
        owners=(0,) * len(targets),
        token_maps=token_maps,
        negative=None if negative_prompt is None else model.encode_prompt([negative_prompt]),
        mask=cells,
        token_steps=held,
        changed=torch.stack([changed for changed, _ in words]),
        deleted=torch.stack([deleted for _, deleted in words]),
    )
    edited = edit_latents(model, task, chosen, callback_on_step_end, "editing")
    if not torch.isfinite(edited.latents).all():
        raise WorkError(f"{model.name} returned numbers that are not finite in {model.dtype}")
    source = inversion.picture or inversion.images(inversion.latents)[0]
    # Pasting blends what is grey, in pixels.
    blended = edited.whole if paste_back and edited.whole is not None else edited.latents
    images = inversion.images(blended)
    masks: list[Image.Image] = []
    kind: MaskKind = "none"
    if drawn is not None:
        masks, kind = [drawn] * len(images), "given"
    elif edited.mask is not None:
        masks, kind = picture_masks(edited.mask, inversion.restore), chosen.mask_from
    if paste_back:
        pairs = zip(images, masks, strict=True)
        images = [pasted(image, source, mask) for image, mask in pairs]
    seconds = time.perf_counter() - started
    diagnosis = diagnosis_of(inversion) if diagnose else None
    if diagnosis is not None and diagnosis.inversion is not inversion:
        warnings += unknown_image(diagnosis.inversion)
    return EditResult(
        images=images,
        prompts=targets,
        inversion=inversion,
        preset=chosen,
        source=source,
        latents=edited.latents,
        alignments=alignments,
        mask=None if edited.mask is None else edited.mask.cpu().numpy(),
        mask_kind=kind,
        masks=masks,
        paste_back=paste_back,
        windows=dict(windows or {}),
        edit_nfe=edited.nfe,
        edit_seconds=seconds,
        inversion_nfe=0 if inversion is given else inversion.nfe,
        inversion_seconds=0.0 if inversion is given else inversion.seconds,
        diagnosis=diagnosis,
        warnings=warnings,
    )


def _alpha_of(image: Picture | Inversion | None) -> Image.Image:
    """What ``keep_alpha`` keeps."""
    if image is None or isinstance(image, Inversion):
        raise InputError("keep_alpha needs the picture itself, whose transparency is kept: give it")
    alpha = load_alpha(image)
    if alpha is None:
        raise InputError("keep_alpha: nothing of the picture is transparent; leave it out")
    return alpha


def _to_be_cut(image: Picture | Inversion | None, mask: bool, preset: Preset) -> Image.Image:
    """What ``crop_to_mask`` cuts from."""
    _check_mask("crop_to_mask", mask, preset)
    if image is None or isinstance(image, Inversion):
        raise InputError("crop_to_mask inverts the region by itself: give the picture")
    return load_image(image)


def _check_mask(name: str, given: bool, preset: Preset) -> None:
    """Refuse what needs a mask where there is none."""
    derived = preset.mask_threshold and "mask_threshold" in METHOD_FIELDS[preset.method]
    if not (given or derived):
        raise InputError(f"{name} needs a mask: give one, or mask_threshold to derive one")


def _check_paste_back(image: Image.Image | Inversion | None, given: bool, preset: Preset) -> None:
    """Refuse pasting back where there is no mask, or nothing to paste."""
    _check_mask("paste_back", given, preset)
    if isinstance(image, Inversion) and image.picture is None and image.seed is None:
        raise InputError(
            "paste_back needs the picture, which this inversion does not hold: give it"
        )
