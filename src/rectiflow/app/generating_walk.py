"""``rectiflow generate --interpolate``: from one seed's picture to another's, as a film."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.app import options
from rectiflow.app.console import Session
from rectiflow.app.generating_pictures import seeds_of
from rectiflow.app.generating_sheet import write_sheet
from rectiflow.app.outputs import Outputs
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.models.base import FlowModel

KINDS = (".gif", ".mp4", ".png")


@dataclass(frozen=True)
class Walk:
    """What is wanted, as the options say."""

    prompts: list[str]
    between: str
    frames: int
    fps: float
    output: Path

    @property
    def seeds(self) -> list[int]:
        """The seeds to pass, in their order."""
        return seeds_of("--interpolate", self.between)

    @property
    def file(self) -> Path:
        """Where the result goes: in a folder, a GIF."""
        return self.output if self.output.suffix else self.output / "walk.gif"

    def check(self) -> None:
        """See that all that needs no model is right.

        Raises:
            InputError: says what to give.
        """
        from rectiflow.report.animation import check_fps, check_video

        if len(self.prompts) > 2:
            raise InputError("--interpolate takes one prompt, or two to go from one to the other")
        if len(self.seeds) < 2:
            raise InputError("--interpolate needs two seeds or more, such as 3,9,12")
        if self.frames < len(self.seeds):
            raise InputError(
                f"--frames is {self.frames}: give {len(self.seeds)} or more, one for each seed"
            )
        check_fps(self.fps)
        kind = self.file.suffix.lower()
        if kind not in KINDS:
            raise InputError(f"-o {self.output} should end in {', '.join(KINDS)}, or be a folder")
        if kind == ".mp4":
            check_video()
        options.output_file(self.file, kind)

    def outputs(self, overwrite: bool) -> Outputs:
        """Where the film goes, known to be free or ours."""
        number = not self.output.suffix
        return Outputs(self.file.parent, [self.file.name], overwrite=overwrite, number=number)


def paint_walk(
    model: FlowModel, about: dict[str, Any], wanted: Walk, terminal: Session, outputs: Outputs
) -> None:
    """Make the frames, write the film or sheet and say so.

    Args:
        model: the network.
        about: the record of `generate`, of its first prompt.
        wanted: the seeds and the rest.
        terminal: for the result.
        outputs: from `Walk.outputs`.
    """
    from rectiflow.models.latent_walk import decoded, walk_latents
    from rectiflow.models.memory import out_of_memory_explained
    from rectiflow.report.animation import save_gif, save_mp4

    started = time.perf_counter()
    with out_of_memory_explained(model):
        solution = walk_latents(
            model,
            wanted.prompts,
            wanted.seeds,
            wanted.frames,
            negative_prompt=about["negative_prompt"],
            num_inference_steps=about["num_inference_steps"],
            guidance_scale=about["guidance_scale"],
            height=about["height"],
            width=about["width"],
            solver=about["method"],
        )
        images = decoded(model, solution.x)
    file = outputs.file(wanted.file.name)
    if file.suffix.lower() == ".gif":
        save_gif(images, file, fps=wanted.fps)
    elif file.suffix.lower() == ".mp4":
        save_mp4(images, file, fps=wanted.fps)
    else:
        captions = [f"{number} of {len(images)}" for number in range(1, len(images) + 1)]
        write_sheet(images, captions, about | {"prompts": wanted.prompts}, wanted.seeds, file)
    outputs.finish()
    seconds = time.perf_counter() - started
    data = {
        "model": model.name,
        "settings": about,
        "prompts": wanted.prompts,
        "seeds": wanted.seeds,
        "frames": len(images),
        "fps": None if file.suffix.lower() == ".png" else wanted.fps,
        "image": file.name,
        "nfe": solution.nfe,
        "seconds": seconds,
        "warnings": terminal.warnings,
    }
    terminal.result(
        data, f"{file}\n{len(images)} frames, {solution.nfe} network samples in {seconds:.1f} s"
    )
