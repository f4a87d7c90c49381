"""The pictures of ``rectiflow generate``: one each, a sheet of many, those picked and refined."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.app import options
from rectiflow.app.console import Session
from rectiflow.app.generating_refined import Refinement
from rectiflow.app.generating_sheet import write_pairs, write_sheet
from rectiflow.app.outputs import Outputs
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from rectiflow.models.base import FlowModel

PREVIEW_BATCH = 8
"""Pictures of a preview that go through network and codec together."""


@dataclass(frozen=True)
class Wanted:
    """What is wanted, as the options say."""

    seed: int
    count: int
    sheet: bool
    pick: str | None
    refinement: Refinement | None
    output: Path

    @property
    def seeds(self) -> list[int]:
        """Of all pictures, or of the preview."""
        return list(range(self.seed, self.seed + self.count))

    @property
    def preview(self) -> bool:
        """Whether a sheet is all that is wanted."""
        return self.sheet and self.pick is None and self.refinement is None

    @property
    def single(self) -> bool:
        """Whether the output is one file."""
        return options.is_picture(self.output)

    def check(self) -> list[int]:
        """The seeds of the pictures to make, once all that needs no model is known to be right.

        Raises:
            InputError: says what to give.
        """
        seeds = self.seeds if self.pick is None else self._picked(self.pick)
        if self.refinement is not None:
            self.refinement.check()
        if self.output.suffix.lower() in (".gif", ".mp4"):
            raise InputError(
                f"{self.output} is for several pictures: give --interpolate too, or a .png"
            )
        if self.single and not self.preview and (len(seeds) > 1 or self.sheet):
            what = "pictures and a sheet" if self.sheet else f"{len(seeds)} pictures"
            raise InputError(f"{what} do not fit into {self.output}: give a folder with -o")
        return seeds

    def outputs(self, seeds: list[int], overwrite: bool) -> Outputs:
        """Where the files go, known to be free or ours."""
        if self.single:
            return Outputs(self.output.parent, [self.output.name], overwrite=overwrite)
        names = [] if self.preview else [f"{seed}.png" for seed in seeds]
        if self.refinement is not None:
            names += [f"{seed}-refined.png" for seed in seeds]
        if self.sheet:
            names.append(self.sheet_name)
        return Outputs(self.output, names, overwrite=overwrite, number=True)

    @property
    def sheet_name(self) -> str:
        """Of the sheet in a folder."""
        if self.preview:
            return "sheet.png"
        return "picked.png" if self.refinement is None else "refined.png"

    def _picked(self, text: str) -> list[int]:
        seeds = seeds_of("--pick", text)
        for seed in seeds:
            if seed not in self.seeds:
                raise InputError(
                    f"--pick {seed} is outside the preview, which has seeds {self.seed} to "
                    f"{self.seeds[-1]}: give the --seed and -n it was made with"
                )
        if len(set(seeds)) < len(seeds):
            raise InputError(f"--pick {text} names a seed twice")
        return seeds


def seeds_of(option: str, text: str) -> list[int]:
    """The seeds in a list such as ``3,7``.

    Raises:
        InputError: it is no such list.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text}: give seeds with commas between, such as 3,7") from None
    if not all(0 <= seed <= options.LARGEST_SEED for seed in seeds):
        raise InputError(f"{option} {text}: a seed is from 0 to {options.LARGEST_SEED}")
    return seeds


def paint(model: FlowModel, made: dict[str, Any]) -> tuple[Image.Image, int]:
    """The picture that a record of `generate` describes, and the network samples it cost.

    One at a time: in a batch its last bits would depend on its company.
    """
    images, nfe = _paint(model, made, [made["seed"]])
    return images[0], nfe


def _paint(
    model: FlowModel, made: dict[str, Any], seeds: Sequence[int]
) -> tuple[list[Image.Image], int]:
    from rectiflow.models import generate_latents, initial_noise, to_pil

    solution = generate_latents(
        model,
        made["prompt"],
        initial_noise(model, seeds, made["height"], made["width"]),
        negative_prompt=made["negative_prompt"],
        num_inference_steps=made["num_inference_steps"],
        guidance_scale=made["guidance_scale"],
        grid=made["grid"],
        solver=made["method"],
        shown_as="generating",
    )
    return to_pil(model.decode(solution.x)), solution.nfe


def paint_pictures(
    model: FlowModel,
    about: dict[str, Any],
    seeds: list[int],
    wanted: Wanted,
    refiner: FlowModel | None,
    terminal: Session,
    outputs: Outputs,
) -> None:
    """Make the pictures, write them and say so.

    Args:
        model: the network.
        about: the record that all pictures share.
        seeds: from `Wanted.check`.
        wanted: what to make.
        refiner: what refines the pictures, if that is wanted.
        terminal: for the result.
        outputs: from `Wanted.outputs`.
    """
    from rectiflow.models.memory import out_of_memory_explained

    started, sheet = time.perf_counter(), None
    with out_of_memory_explained(model):
        if wanted.preview:
            sheet = outputs.file(wanted.output.name if wanted.single else wanted.sheet_name)
            entries = _preview(model, about, seeds, sheet)
        else:
            entries, before = _one_by_one(model, about, seeds, wanted, refiner is None, outputs)
    if not wanted.preview:
        after: list[Image.Image] = []
        if refiner is not None:
            assert wanted.refinement is not None
            with out_of_memory_explained(refiner):
                refined, after = wanted.refinement.write_all(
                    refiner,
                    before,
                    about,
                    seeds,
                    wanted.output.name if wanted.single else None,
                    outputs,
                )
            entries += refined
        if wanted.sheet:
            sheet = outputs.file(wanted.sheet_name)
            write_pairs(before, after, about, seeds, sheet)
    outputs.finish()
    nfe, seconds = sum(entry["nfe"] for entry in entries), time.perf_counter() - started
    data = {
        "model": model.name,
        "settings": about,
        "images": entries,
        "sheet": None if sheet is None else sheet.name,
        "nfe": nfe,
        "seconds": seconds,
        "warnings": terminal.warnings,
    }
    if wanted.refinement is not None and refiner is not None:
        data["refinement"] = wanted.refinement.record(refiner)
    lines = [str(outputs.folder / entry["image"]) for entry in entries if entry["image"]]
    lines += [str(sheet)] if sheet is not None else []
    lines.append(f"{nfe} network samples in {seconds:.1f} s")
    terminal.result(data, "\n".join(lines))


def _preview(
    model: FlowModel, about: dict[str, Any], seeds: list[int], file: Path
) -> list[dict[str, Any]]:
    """The sheet of all seeds, and what each picture on it cost."""
    images: list[Image.Image] = []
    nfe = 0
    for first in range(0, len(seeds), PREVIEW_BATCH):
        made, spent = _paint(model, about, seeds[first : first + PREVIEW_BATCH])
        images += made
        nfe += spent
    write_sheet(images, [f"seed {seed}" for seed in seeds], about, seeds, file)
    each = nfe // len(seeds)
    return [{"image": None, "prompt": about["prompt"], "seed": seed, "nfe": each} for seed in seeds]


def _one_by_one(
    model: FlowModel,
    about: dict[str, Any],
    seeds: list[int],
    wanted: Wanted,
    final: bool,
    outputs: Outputs,
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Pictures in files of their own; a single one that is still to be refined in none."""
    from rectiflow.report import save_picture

    entries: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    for seed in seeds:
        made = about | {"seed": seed}
        image, spent = paint(model, made)
        name = None
        if final or not wanted.single:
            file = outputs.file(wanted.output.name if wanted.single else f"{seed}.png")
            name = save_picture(image, file, made).name
        entries.append({"image": name, "prompt": about["prompt"], "seed": seed, "nfe": spent})
        images.append(image)
    return entries, images
