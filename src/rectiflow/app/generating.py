"""``rectiflow generate``: pictures from a prompt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options, record
from rectiflow.app.console import evaluations, session
from rectiflow.app.generating_together import Together, paint_together
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from rectiflow.models.base import FlowModel


def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...",
            help="What the picture should show; several with --consistent.",
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
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder, or for one picture a .png file.")
    ] = Path("out"),
    model: options.ModelName = options.DEFAULT_MODEL,
    device: options.Device = None,
    dtype: options.NetworkDtype = options.Dtype.float32,
    offload: options.Offload = options.OffloadTo.none,
    base: options.Base = None,
    lora: options.Lora = None,
    as_json: options.AsJson = False,
) -> None:
    """Generate pictures from a prompt.

    With --consistent, one for each of several prompts: the first leads, the others start from its
    noise and keep its subject, more of it with --set attention_ratio=0.5.

    What made a picture is kept inside it; see `rectiflow info` and `replay`.
    """
    with session(as_json) as terminal:
        options.check_finite("--guidance", guidance)
        if consistent:
            fixed = {"--negative": negative, "--count": count > 1, "--solver": solver is not None}
            given = [name for name, value in fixed.items() if value]
            if given:
                raise InputError(f"--consistent does not take {', '.join(given)}: leave it out")
            wanted = Together(prompts, seed, steps, guidance, height, width, settings or [], output)
            preset = wanted.check()
            loaded = options.load_model(model, dtype, device, offload=offload, base=base, lora=lora)
            paint_together(loaded, wanted, preset, options.parts_of(model, base, lora), terminal)
            return
        if len(prompts) > 1 or settings:
            what = "several prompts are" if len(prompts) > 1 else "--set is"
            raise InputError(f"{what} for --consistent: give it too, or one prompt alone")
        (prompt,) = prompts
        single = output.suffix.lower() == ".png"
        if single and count > 1:
            raise InputError(f"{count} pictures do not fit into {output}: give a folder with -o")
        if single:
            options.output_file(output, ".png")
        else:
            options.output_folder(output)
        loaded = options.load_model(model, dtype, device, offload=offload, base=base, lora=lora)
        if guidance is None:
            guidance = loaded.default_guidance_scale
        if negative and guidance == 1:
            terminal.warn("the negative prompt has no effect at guidance 1")
        from rectiflow.models.schedulers import SCHEDULERS

        solver = loaded.default_solver if solver is None else solver
        about = (
            record.of_model(loaded)
            | options.parts_of(model, base, lora)
            | {
                "command": "generate",
                "prompt": prompt,
                "negative_prompt": negative,
                "num_inference_steps": loaded.default_num_inference_steps
                if steps is None
                else steps,
                "guidance_scale": guidance,
                # Solvers of diffusers stand on their own.
                "grid": None if solver in SCHEDULERS else loaded.default_grid,
                "method": solver,
                "height": loaded.default_size if height is None else height,
                "width": loaded.default_size if width is None else width,
            }
        )
        from rectiflow.models.memory import out_of_memory_explained
        from rectiflow.report import save_png

        started, nfe = time.perf_counter(), 0
        images: list[dict[str, Any]] = []
        with evaluations(loaded, "generating") as bar, out_of_memory_explained(loaded):
            for number in range(count):
                bar.set_description(f"generating {number + 1} of {count}")
                made = about | {"seed": seed + number}
                image, spent = paint(loaded, made)
                nfe += spent
                file = output if single else output / f"{seed + number}.png"
                save_png(image, file, made)
                images.append(
                    {"image": file.name, "prompt": prompt, "seed": seed + number, "nfe": spent}
                )
        seconds = time.perf_counter() - started
        folder = output.parent if single else output
        data = {
            "model": loaded.name,
            "settings": about,
            "images": images,
            "nfe": nfe,
            "seconds": seconds,
            "warnings": terminal.warnings,
        }
        lines = [str(folder / entry["image"]) for entry in images]
        lines.append(f"{nfe} network samples in {seconds:.1f} s")
        terminal.result(data, "\n".join(lines))


def paint(model: FlowModel, made: dict[str, Any]) -> tuple[Image.Image, int]:
    """The picture that a record of `generate` describes, and the network samples it cost.

    One at a time: in a batch its last bits would depend on its company.
    """
    from rectiflow.models import generate_latents, initial_noise, to_pil

    noise = initial_noise(model, [made["seed"]], made["height"], made["width"])
    solution = generate_latents(
        model,
        made["prompt"],
        noise,
        negative_prompt=made["negative_prompt"],
        num_inference_steps=made["num_inference_steps"],
        guidance_scale=made["guidance_scale"],
        grid=made["grid"],
        solver=made["method"],
    )
    return to_pil(model.decode(solution.x))[0], solution.nfe
