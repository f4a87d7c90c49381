"""What an edit leaves behind: pictures that say what made them, its JSON, its summary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from rectiflow.app import options, record
from rectiflow.app.edit_job import Around

if TYPE_CHECKING:
    from rectiflow.invert import Diagnosis, Inversion, Preset
    from rectiflow.models.base import FlowModel
    from rectiflow.steer import EditResult


def method_name(name: str | None, preset: Preset) -> str:
    """The preset's name, marked where fields were replaced."""
    from rectiflow.invert import presets

    return presets.method_name(preset, name)


def about(
    model: FlowModel,
    result: EditResult,
    negative_prompt: str | None,
    origin: tuple[Path, Image.Image | None] | None,
    mask: Path | None,
    preset: str | None = None,
) -> dict[str, Any]:
    """What is kept in every picture of an edit, enough to make it again.

    Args:
        model: the network.
        result: the edit.
        negative_prompt: as it was given.
        origin: the source's file and, unless that is an inversion, its picture.
        mask: its file.
        preset: its name, if one was given.
    """
    image, picture = origin or (None, None)
    return record.of_model(model) | {
        "command": "edit",
        "source_prompt": result.inversion.source_prompt,
        "prompts": result.prompts[:: result.variants],
        "negative_prompt": negative_prompt,
        "method": method_name(preset, result.preset),
        "settings": options.whole(result.preset),
        "grid": result.inversion.grid.tolist(),
        "seed": result.inversion.seed,
        "source_guidance": result.inversion.guidance_scale,
        "source": None if image is None else str(image.resolve()),
        "source_hash": source_hash(image, picture),
        "mask": None if mask is None else str(mask.resolve()),
        "mask_hash": None if mask is None else record.file_hash(mask),
        "nfe": result.nfe,
    }


def source_hash(image: Path | None, picture: Image.Image | None) -> str | None:
    """What tells later whether a source is still the one that was edited."""
    if picture is not None:
        return record.pixel_hash(picture)
    return None if image is None else record.file_hash(image)


def write_pictures(
    place: Callable[[str], Path], result: EditResult, made: dict[str, Any], single: str | None
) -> list[str]:
    """Write the source, the reconstruction if there is one, and edits; the names of the edits.

    Args:
        place: where a file of a name goes.
        result: the edit.
        made: what is kept in every picture.
        single: the name of the edit, if that is all that is written.
    """
    from rectiflow.report import save_picture, save_png

    if single is not None:
        about = {"role": "edit", "number": 1, "prompt": result.prompts[0]}
        save_picture(result.images[0], place(single), made | about)
        return [single]

    inversion = result.inversion
    about_source: dict[str, Any] = {"command": "source", "source": made["source"]}
    if inversion.seed is not None:
        about_source = {
            **record.of_model(inversion.model),
            "command": "generate",
            "prompt": inversion.source_prompt,
            "negative_prompt": None,
            "seed": inversion.seed,
            "num_inference_steps": inversion.preset.num_inference_steps,
            "guidance_scale": inversion.guidance_scale,
            "grid": inversion.preset.grid,
            "method": "euler",
            "height": result.source.height,
            "width": result.source.width,
        }
    save_png(result.source, place("source.png"), about_source)
    if result.diagnosis is not None:
        back = result.placed(result.diagnosis.reconstruction.image)
        save_png(back, place("reconstruction.png"), made | {"role": "reconstruction"})
    names = []
    for number, (image, prompt) in enumerate(zip(result.images, result.prompts, strict=True)):
        names.append(f"edit-{number + 1}.png")
        about = {"role": "edit", "number": number // result.variants + 1, "prompt": prompt}
        if result.noise_seeds:  # each is made again by itself
            about["settings"] = made["settings"] | {"noise_seed": result.noise_seeds[number]}
        save_png(image, place(names[-1]), made | about)
    return names


def as_data(
    result: EditResult,
    made: dict[str, Any],
    images: list[str],
    report: str | None,
    warnings: list[str],
) -> dict[str, Any]:
    """The JSON of an edit; a PSNR of equal pictures is infinite, which JSON writes as null."""
    inversion, diagnosis, count = result.inversion, result.diagnosis, len(result.images)
    known = inversion if diagnosis is None else diagnosis.inversion
    seeds = result.noise_seeds or [0] * count
    shown = ("source_prompt", "negative_prompt", "seed", "source", "mask",
             *(one.name for one in dataclasses.fields(Around)))  # fmt: skip
    return {
        "model": inversion.model.name,
        "preset": made["method"],
        "settings": made["settings"]
        | {key: made[key] for key in (*shown, "dtype", "device", "weight_hash")},
        "mask": result.mask_kind,
        "inversion": inversion_data(known, diagnosis)
        | {"nfe": inversion.nfe, "seconds": inversion.seconds},
        **({} if diagnosis is None else {"reconstruction": returned(diagnosis, _inverted(result))}),
        "edits": [
            {
                "prompt": prompt,
                "image": image,
                **({"noise_seed": noise_seed} if result.noise_seeds else {}),
                "nfe": result.edit_nfe // count,
                "seconds": result.edit_seconds / count,
            }
            for prompt, image, noise_seed in zip(result.prompts, images, seeds, strict=True)
        ],
        "nfe": result.nfe,
        "seconds": result.seconds["total"],
        "report": report,
        "warnings": warnings,
    }


def _inverted(result: EditResult) -> Image.Image:
    """The picture that was inverted: the source on white, or the region of it that was edited."""
    from rectiflow.models.picture import load_image

    source = load_image(result.source)
    return source if result.region is None else source.crop(result.region)


def inversion_data(inversion: Inversion, diagnosis: Diagnosis | None = None) -> dict[str, Any]:
    """What an inversion cost, and what is known of how good it is."""
    noise = inversion.noise_statistics
    found: dict[str, Any] = {
        "nfe": inversion.nfe,
        "seconds": inversion.seconds,
        "noise": None if noise is None else dataclasses.asdict(noise),
        "residual": inversion.residual,
    }
    if diagnosis is not None:
        found["compensation"] = float(diagnosis.reconstruction.compensation.max())
    return {name: value for name, value in found.items() if value is not None}


def returned(diagnosis: Diagnosis, source: Image.Image) -> dict[str, float]:
    """How well a picture came back, in JSON."""
    from rectiflow.report.pictures import psnr

    exact, inversion = diagnosis.reconstruction, diagnosis.inversion
    codec = inversion.images(inversion.latents)[0]
    return {
        "max_abs_latent": exact.max_abs_latent,
        "uncompensated_psnr": psnr(diagnosis.uncompensated.image, codec),
        "psnr": psnr(exact.image, source),
        "psnr_codec": psnr(codec, source),
    }


def summary(data: dict[str, Any], folder: Path) -> str:
    """An edit in a few lines."""
    lines = [f"{folder / edit['image']}: {edit['prompt']}" for edit in data["edits"]]
    lines.append(f"{samples(data['nfe'])} in {data['seconds']:.1f} s")
    if (kept := data.get("reconstruction")) is not None:
        lines.append(
            f"source reconstructed: {_decibels(kept['psnr'])} (codec alone: "
            f"{_decibels(kept['psnr_codec'])}; without compensation "
            f"{_decibels(kept['uncompensated_psnr'])} to the codec's)"
        )
    if data["report"] is not None:
        lines.append(f"report: {folder / data['report']}")
    return "\n".join(lines)


def samples(nfe: dict[str, int]) -> str:
    """How many network samples were spent, and on what."""
    from rectiflow.report import words

    parts = words.samples(**{name: count for name, count in nfe.items() if name != "total"})
    return f"{nfe['total']} network samples" + (f" ({parts})" if parts else "")


def _decibels(psnr: float) -> str:
    return "identical" if math.isinf(psnr) else f"{psnr:.1f} dB"
