"""``rectiflow chain``: edit a picture turn by turn, and say how far the turns drift."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options, record
from rectiflow.app.console import session
from rectiflow.app.outputs import Outputs, Overwrite
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
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the pictures and chain.json, or a .png, .jpg or .webp file for the "
            "last turn.",
        ),
    ] = Path("out"),
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Beside a picture that -o names, write a .json of all turns."
        ),
    ] = False,
    overwrite: Overwrite = False,
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
        from rectiflow.report import save_picture, save_png
        from rectiflow.steer.masks import read_mask

        reused = image is not None and image.suffix == ".safetensors"
        chosen, named = options.preset_of(
            preset, settings, steps=steps, guidance=guidance, reused=reused
        )
        turns = to or []
        _check(image, seed, source_prompt, turns)
        outputs = _outputs(output, len(turns), one_shot, report, overwrite, (image, mask))
        single = options.is_picture(output)
        picture = None if image is None or reused else load_image(image)
        if mask is not None and picture is not None:
            read_mask(mask, picture.size, invert=mask_invert, resize=mask_resize)
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
        if single:
            last = {"role": "turn", "number": len(turns), "prompt": turns[-1]}
            save_picture(result.turns[-1].image, outputs.file(output.name), made | last)
            data = _data(result, made, output.name, False, terminal.warnings)
            if report:
                write_json(outputs.file(output.with_suffix(".json").name), data)
            outputs.finish()
            terminal.result(data, _summary(data, result, output.parent))
            return
        save_png(result.source, outputs.file("source.png"), made | {"role": "source"})
        for number, turn in enumerate(result.turns, 1):
            about = made | {"number": number, "prompt": turn.prompt}
            save_png(turn.image, outputs.file(f"turn-{number}.png"), about | {"role": "turn"})
            if one_shot:
                assert turn.one_shot is not None
                shot = about | {"role": "one shot"}
                save_png(turn.one_shot, outputs.file(f"one-shot-{number}.png"), shot)
        save_png(result.sheet(), outputs.file("sheet.png"), made | {"role": "sheet"})
        data = _data(result, made, None, one_shot, terminal.warnings)
        write_json(outputs.file("chain.json"), data)
        outputs.finish()
        terminal.result(data, _summary(data, result, output))


def _check(
    image: Path | None,
    seed: int | None,
    source_prompt: str | None,
    turns: list[str],
) -> None:
    """Refuse a chain that cannot be, before any work."""
    if not turns:
        raise InputError('give --to "..." for each turn: what should the image show then?')
    if (image is None) == (seed is None):
        raise InputError("give an image or --seed, one of the two")
    if not source_prompt and (image is None or image.suffix != ".safetensors"):
        raise InputError('a chain needs --from "...": what does the image show now?')


def _outputs(
    output: Path, turns: int, one_shot: bool, report: bool, overwrite: bool, reads: Any
) -> Outputs:
    """Where the files go, known to be free or ours."""
    if options.is_picture(output):
        if one_shot:
            raise InputError(f"--one-shot pictures do not fit into {output}: give a folder with -o")
        names = [output.name, *([output.with_suffix(".json").name] if report else [])]
        return Outputs(output.parent, names, overwrite=overwrite, reads=reads)
    if report:
        raise InputError("--report is for a picture that -o names: a folder has chain.json anyway")
    kinds = ("turn", "one-shot") if one_shot else ("turn",)
    names = [f"{kind}-{number}.png" for kind in kinds for number in range(1, turns + 1)]
    names += ["source.png", "sheet.png", "chain.json"]
    return Outputs(output, names, overwrite=overwrite, reads=reads)


def _data(
    result: ChainResult,
    made: dict[str, Any],
    single: str | None,
    one_shot: bool,
    warnings: list[str],
) -> dict[str, Any]:
    last = len(result.turns)
    shown = ("prompts", "negative_prompt", "seed", "source", "mask", "dtype", "device")
    return {
        "model": result.inversion.model.name,
        "preset": made["method"],
        "settings": made["settings"] | {key: made[key] for key in (*shown, "weight_hash")},
        "inversion": inversion_data(result.inversion),
        "turns": [
            {
                "prompt": turn.prompt,
                "image": f"turn-{number}.png"
                if single is None
                else (single if number == last else None),
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
        "sheet": "sheet.png" if single is None else None,
        "warnings": warnings,
    }


def _psnr(distances: Distances | None) -> dict[str, float | None] | None:
    """To the source, and to it outside the mask; the command knows no true results."""
    if distances is None:
        return None
    return {key: value for key, value in dataclasses.asdict(distances).items() if key != "target"}


def _summary(data: dict[str, Any], result: ChainResult, folder: Path) -> str:
    from rectiflow.report.words import decibels

    lines = []
    for number, turn in enumerate(result.turns, 1):
        assert turn.drift is not None
        said = f"{decibels(turn.drift)} to one shot"
        if turn.returns:
            said += f", back at the source: {decibels(turn.distances.source)}"
        name = data["turns"][number - 1]["image"]
        where = f"turn {number}" if name is None else folder / name
        lines.append(f"{where}: {turn.prompt} ({said})")
    lines.append(f"{samples(result.nfe)}; the turns took {result.seconds:.1f} s")
    if data["sheet"] is not None:
        lines.append(f"all turns: {folder / data['sheet']}")
    return "\n".join(lines)
