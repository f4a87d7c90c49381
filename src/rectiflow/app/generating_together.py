"""``rectiflow generate --consistent``: pictures of one subject."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rectiflow.app import options, record
from rectiflow.app.console import Session
from rectiflow.app.outputs import Outputs
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.invert import Preset
    from rectiflow.models.base import FlowModel


@dataclass(frozen=True)
class Together:
    """What is wanted, as the options say."""

    prompts: list[str]
    seed: int
    steps: int | None
    guidance: float | None
    height: int | None
    width: int | None
    settings: list[str]
    output: Path

    def check(self) -> Preset:
        """The preset with what was set, once all that needs no model is known to be right.

        Raises:
            InputError: says what to give.
        """
        if len(self.prompts) < 2:
            raise InputError("--consistent needs two prompts or more, in quotation marks each")
        if options.is_picture(self.output):
            raise InputError(f"several pictures do not fit into {self.output}: give a folder")
        preset, _ = options.preset_of("subject", self.settings, steps=self.steps)
        return preset

    def outputs(self, overwrite: bool) -> Outputs:
        """Where the files go."""
        names = [f"{self.seed}-{number + 1}.png" for number in range(len(self.prompts))]
        return Outputs(self.output, names, overwrite=overwrite, number=True)


def paint_together(
    model: FlowModel,
    wanted: Together,
    preset: Preset,
    terminal: Session,
    outputs: Outputs,
) -> None:
    """Generate the pictures, write them and say so.

    Args:
        model: the network.
        wanted: the prompts and the rest.
        preset: from `Together.check`.
        terminal: for warnings and the result.
        outputs: from `Together.outputs`.
    """
    import rectiflow
    from rectiflow.models.memory import out_of_memory_explained
    from rectiflow.report import save_png

    started = time.perf_counter()
    with out_of_memory_explained(model):
        result = rectiflow.consistent(
            model,
            wanted.prompts,
            seed=wanted.seed,
            preset=preset,
            guidance_scale=wanted.guidance,
            num_inference_steps=wanted.steps,
            height=wanted.height,
            width=wanted.width,
        )
    seconds = time.perf_counter() - started
    for warning in result.warnings:
        terminal.warn(warning)
    made = record.of_model(model) | {
        "command": "generate --consistent",
        "prompts": result.prompts,
        "seed": wanted.seed,
        "method": "subject",
        "settings": options.whole(result.edit.preset),
        "height": result.images[0].height,
        "width": result.images[0].width,
    }
    images, lines = [], []
    for number, (image, prompt) in enumerate(zip(result.images, result.prompts, strict=True), 1):
        file = outputs.file(f"{wanted.seed}-{number}.png")
        save_png(image, file, made | {"number": number, "prompt": prompt})
        images.append({"image": file.name, "prompt": prompt, "seed": wanted.seed})
        lines.append(f"{file}: {prompt}")
    outputs.finish()
    data = {
        "model": model.name,
        "settings": made,
        "images": images,
        "nfe": result.nfe,
        "seconds": seconds,
        "warnings": terminal.warnings,
    }
    lines.append(f"{result.nfe} network samples in {seconds:.1f} s")
    terminal.result(data, "\n".join(lines))
