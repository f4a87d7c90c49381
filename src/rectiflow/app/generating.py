"""``rectiflow generate``: pictures from a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options, record
from rectiflow.app.console import session
from rectiflow.app.generating_pictures import Wanted, paint_pictures
from rectiflow.app.generating_refined import Refinement
from rectiflow.app.generating_together import Together, paint_together
from rectiflow.app.generating_walk import Walk, paint_walk
from rectiflow.app.outputs import Overwrite
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.models.base import FlowModel


@options.takes_model()
def generate(
    *,
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...",
            help="What the picture should show; several with --consistent, and with --interpolate "
            "two to go from one to the other.",
            show_default=False,
        ),
    ],
    negative: Annotated[
        str | None, typer.Option(help="What guidance pushes away from.", show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=options.LARGEST_SEED // 2, help="Of the first picture.")
    ] = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default=False)] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="euler, midpoint, heun, rk4, ab2 or dopri5; of Stable Diffusion 1, 2 and XL also "
            "dpmpp, unipc or ddim.  [default: the model's]",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="How many, from seed, seed + 1, ...")
    ] = 1,
    consistent: Annotated[
        bool,
        typer.Option(
            "--consistent",
            help="A picture for each prompt, with the subject of the first in all of them.",
        ),
    ] = False,
    settings: options.Settings = None,
    sheet: Annotated[
        bool,
        typer.Option(
            "--sheet",
            help="Instead of files one sheet of all pictures, made together: a preview. With "
            "--pick or --refine, a sheet of those beside the files.",
        ),
    ] = False,
    pick: Annotated[
        str | None,
        typer.Option(
            metavar="SEEDS", help="Write these of the preview alone: 3,7.", show_default=False
        ),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Refine the pictures by another model, with noise and back.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="The share of that noise, up to 1.  [default: 0.5]", show_default=False),
    ] = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(
            help="Of the refining model from noise alone, of which the last part is made.  "
            "[default: the model's]",
            show_default=False,
        ),
    ] = None,
    refine_guidance: Annotated[
        float | None,
        typer.Option(min=0, help="Likewise.  [default: the model's]", show_default=False),
    ] = None,
    interpolate: Annotated[
        str | None,
        typer.Option(
            metavar="SEEDS",
            help="A film from one seed's picture to the next one's: 3,9,12. -o names a .gif, .mp4, "
            "or .png for a sheet.",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Pictures of the film.  [default: 24]", show_default=False),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Of them in a second.  [default: 10]", show_default=False),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A folder, or for one picture a .png, .jpg or .webp file. In a folder nothing is "
            "replaced: what is there already gets company such as 0-run2.png.",
        ),
    ] = Path("out"),
    overwrite: Overwrite = False,
    model: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Generate pictures from a prompt.

    With a one-step model, look first and choose then: -n 16 --sheet shows 16 seeds on one sheet,
    --pick 3,7 writes those, and --refine MODEL makes them over by a many-step model.
    With --interpolate, a film between the pictures of several seeds.
    With --consistent, one for each of several prompts: the first leads, the others start from its
    noise and keep its subject, more of it with --set attention_ratio=0.5.

    What made a picture is kept inside it; see `rectiflow info` and `replay`.
    """
    with session(as_json) as terminal:
        options.check_finite("--guidance", guidance)
        refinement = Refinement.of(refine, strength, refine_steps, refine_guidance)
        chosen = {"--sheet": sheet, "--pick": pick is not None, "--refine": refine is not None}
        filmed = {"--frames": frames is not None, "--fps": fps is not None}
        if consistent:
            fixed = {"--negative": negative, "--count": count > 1, "--solver": solver is not None}
            fixed |= chosen | {"--interpolate": interpolate is not None} | filmed
            _refuse_all("--consistent", fixed)
            wanted = Together(prompts, seed, steps, guidance, height, width, settings or [], output)
            preset = wanted.check()
            outputs = wanted.outputs(overwrite)
            paint_together(model.load(), wanted, preset, terminal, outputs)
            return
        if interpolate is None and len(prompts) > 1:
            raise InputError(
                "several prompts are for --consistent, and two for --interpolate: give one of "
                "these too, or one prompt alone"
            )
        if settings:
            raise InputError("--set is for --consistent: give it too, or leave --set out")
        film, pictures, seeds = None, None, []
        if interpolate is None:
            _refuse_all("a picture without --interpolate", filmed)
            pictures = Wanted(seed, count, sheet, pick, refinement, output)
            seeds = pictures.check()
            outputs = pictures.outputs(seeds, overwrite)
        else:
            own = {"--seed": seed > 0, "--count": count > 1}
            _refuse_all("--interpolate", own | chosen)
            film = Walk(
                prompts,
                interpolate,
                24 if frames is None else frames,
                10.0 if fps is None else fps,
                output,
            )
            film.check()
            outputs = film.outputs(overwrite)
        loaded = model.load()
        about = _about(loaded, prompts[0], negative, steps, guidance, solver, height, width)
        if negative and (loaded.guidance_embeds or about["guidance_scale"] <= 1):
            terminal.warn("the negative prompt has no effect without guidance")
        if film is not None:
            paint_walk(loaded, about, film, terminal, outputs)
            return
        assert pictures is not None
        refiner = None
        if refine is not None:
            alike = options.ModelOptions(
                refine, device=model.device, dtype=model.dtype, offload=model.offload
            )
            refiner = alike.load()
        paint_pictures(loaded, about, seeds, pictures, refiner, terminal, outputs)


def _refuse_all(what: str, given: dict[str, Any]) -> None:
    named = [name for name, value in given.items() if value]
    if named:
        raise InputError(f"{what} does not take {', '.join(named)}: leave it out")


def _about(
    loaded: FlowModel,
    prompt: str,
    negative: str | None,
    steps: int | None,
    guidance: float | None,
    solver: str | None,
    height: int | None,
    width: int | None,
) -> dict[str, Any]:
    """The record that all pictures share: what was asked for, and the model's defaults."""
    from rectiflow.models.schedulers import SCHEDULERS

    solver = loaded.default_solver if solver is None else solver
    return record.of_model(loaded) | {
        "command": "generate",
        "prompt": prompt,
        "negative_prompt": negative,
        "num_inference_steps": loaded.default_num_inference_steps if steps is None else steps,
        "guidance_scale": loaded.default_guidance_scale if guidance is None else guidance,
        # Solvers of diffusers stand on their own.
        "grid": None if solver in SCHEDULERS else loaded.default_grid,
        "method": solver,
        "height": loaded.default_size if height is None else height,
        "width": loaded.default_size if width is None else width,
    }
