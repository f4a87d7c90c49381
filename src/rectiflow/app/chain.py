"""``rectiflow chain``: edit a picture turn by turn, and say how far the turns drift."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options, record
from rectiflow.app.console import session
from rectiflow.app.results import inversion_data, method_name, samples, source_hash
from rectiflow.app.suites import write_json
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from rectiflow.invert import Inversion
    from rectiflow.steer.chain import ChainResult, Distances


@options.takes_model()
def chain(
    *,
    image: Annotated[
        Path | None,
        typer.Argument(help="An image of any size, or an inversion saved by `rectiflow invert`."),
    ] = None,
    source_prompt: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="PROMPT", help="What the image shows now.", show_default=False
        ),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="PROMPT",
            help="What it should show after this turn; repeat for more turns.",
            show_default=False,
        ),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What guidance pushes away from.", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="An image of the same size: white, or opaque on transparent, where the edits may "
            "change it, grey where they may by that share.",
            show_default=False,
        ),
    ] = None,
    mask_invert: Annotated[
        bool, typer.Option("--mask-invert", help="The mask is black where the edits may change it.")
    ] = False,
    mask_resize: Annotated[
        bool, typer.Option("--mask-resize", help="Stretch a mask of another size.")
    ] = False,
    one_shot: Annotated[
        bool,
        typer.Option("--one-shot", help="Also write the original edited straight to each prompt."),
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the pictures and chain.json.")
    ] = Path("out"),
    seed: options.Seed = None,
    model: options.ModelOptions,
    preset: options.PresetName = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    settings: options.Settings = None,
    as_json: options.AsJson = False,
) -> None:
    """Edit an image in turns, each from the one before.

    Turns hand on latents, without the codec between them. The folder gets source.png, turn-1.png,
    ..., sheet.png and chain.json, which says how far each turn has drifted from the edit of the
    original straight to its prompt. With --seed instead of an image, what the model generates
    from --from is edited.
    """
    with session(as_json) as terminal:
        from rectiflow.models.picture import load_image
        from rectiflow.report import save_png
        from rectiflow.steer.masks import read_mask

        reused = image is not None and image.suffix == ".safetensors"
        chosen, named = options.preset_of(
            preset, settings, steps=steps, guidance=guidance, reused=reused
        )
        turns = to or []
        _check(image, seed, source_prompt, turns, mask, output)
        picture = None if image is None or reused else load_image(image)
        if mask is not None and picture is not None:
            read_mask(mask, picture.size, invert=mask_invert, resize=mask_resize)
        options.output_folder(output)
        loaded = model.load()
        chosen = options.preset_on(loaded, chosen, preset, named)
        import rectiflow
        from rectiflow.models.memory import out_of_memory_explained

        source: Image.Image | Inversion | None = picture
        replaced: dict[str, Any] = {}
        if reused:
            assert image is not None
            source = rectiflow.Inversion.load(image, loaded)
            replaced = {name: getattr(chosen, name) for name in named}
            chosen = source.preset if preset is None else chosen
            source_prompt = source_prompt or source.source_prompt
        with (
            warnings.catch_warnings(),
            out_of_memory_explained(loaded),
        ):
            warnings.simplefilter("ignore")  # the result has them all, in full
            result = rectiflow.edit_chain(
                loaded,
                source,
                prompts=[source_prompt or "", *turns],
                negative_prompt=negative,
                preset=chosen,
                mask=mask,
                mask_invert=mask_invert,
                mask_resize=mask_resize,
                seed=seed,
                **replaced,
            )
        for warning in result.warnings:
            terminal.warn(warning)
        made = record.of_model(loaded) | {
            "command": "chain",
            "prompts": result.prompts,
            "negative_prompt": negative,
            "method": method_name(preset, result.preset),
            "settings": options.whole(result.preset),
            "seed": seed,
            "guidance_scale": result.inversion.guidance_scale,
            "source": None if image is None else str(image.resolve()),
            "source_hash": source_hash(image, picture),
            "mask": None if mask is None else str(mask.resolve()),
            "mask_invert": mask_invert,
            "mask_resize": mask_resize,
            "mask_hash": None if mask is None else record.file_hash(mask),
            "nfe": result.nfe,
        }
        save_png(result.source, output / "source.png", made | {"role": "source"})
        for number, turn in enumerate(result.turns, 1):
            about = made | {"number": number, "prompt": turn.prompt}
            save_png(turn.image, output / f"turn-{number}.png", about | {"role": "turn"})
            if one_shot:
                assert turn.one_shot is not None
                shot = about | {"role": "one shot"}
                save_png(turn.one_shot, output / f"one-shot-{number}.png", shot)
        save_png(result.sheet(), output / "sheet.png", made | {"role": "sheet"})
        data = _data(result, made, one_shot, terminal.warnings)
        write_json(output / "chain.json", data)
        terminal.result(data, _summary(result, output))


def _check(
    image: Path | None,
    seed: int | None,
    source_prompt: str | None,
    turns: list[str],
    mask: Path | None,
    output: Path,
) -> None:
    """Refuse a chain that cannot be, before any work."""
    if not turns:
        raise InputError('give --to "..." for each turn: what should the image show then?')
    if (image is None) == (seed is None):
        raise InputError("give an image or --seed, one of the two")
    if not source_prompt and (image is None or image.suffix != ".safetensors"):
        raise InputError('a chain needs --from "...": what does the image show now?')
    numbers = range(1, len(turns) + 1)
    names = {"source.png", "sheet.png", "chain.json"}
    names |= {f"{kind}-{number}.png" for kind in ("turn", "one-shot") for number in numbers}
    written = {(output / name).resolve() for name in names}
    for file in (image, mask):
        if file is not None and file.resolve() in written:
            raise InputError(f"{file} would be overwritten: choose another folder with -o")


def _data(
    result: ChainResult, made: dict[str, Any], one_shot: bool, warnings: list[str]
) -> dict[str, Any]:
    shown = ("prompts", "negative_prompt", "seed", "source", "mask", "dtype", "device")
    return {
        "model": result.inversion.model.name,
        "preset": made["method"],
        "settings": made["settings"] | {key: made[key] for key in (*shown, "weight_hash")},
        "inversion": inversion_data(result.inversion),
        "turns": [
            {
                "prompt": turn.prompt,
                "image": f"turn-{number}.png",
                "one_shot": f"one-shot-{number}.png" if one_shot else None,
                "drift": turn.drift,
                "psnr": _psnr(turn.distances),
                "one_shot_psnr": _psnr(turn.one_shot_distances),
                "returns": turn.returns,
                "max_abs_latent": turn.max_abs_latent,
                "nfe": turn.nfe,
                "seconds": turn.seconds,
            }
            for number, turn in enumerate(result.turns, 1)
        ],
        "nfe": result.nfe,
        "seconds": result.seconds,
        "sheet": "sheet.png",
        "warnings": warnings,
    }


def _psnr(distances: Distances | None) -> dict[str, float | None] | None:
    """To the source, and to it outside the mask; the command knows no true results."""
    if distances is None:
        return None
    return {key: value for key, value in dataclasses.asdict(distances).items() if key != "target"}


def _summary(result: ChainResult, folder: Path) -> str:
    from rectiflow.report.words import decibels

    lines = []
    for number, turn in enumerate(result.turns, 1):
        assert turn.drift is not None
        said = f"{decibels(turn.drift)} to one shot"
        if turn.returns:
            said += f", back at the source: {decibels(turn.distances.source)}"
        lines.append(f"{folder / f'turn-{number}.png'}: {turn.prompt} ({said})")
    lines.append(f"{samples(result.nfe)}; the turns took {result.seconds:.1f} s")
    lines.append(f"all turns: {folder / 'sheet.png'}")
    return "\n".join(lines)
