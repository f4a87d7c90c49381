"""The COCO protocol's pictures: drawn from captions in any number of processes and sittings.

Pictures lie at ``OUTPUT/pictures/ID.png``, each written whole or not at all; what exists is not
made again. ``OUTPUT/settings.json`` says what made them, and nothing made otherwise is ever put
beside them. `coco_metrics` measures what is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rectiflow.errors import InputError
from rectiflow.evaluate.coco_data import Coco, CocoImage
from rectiflow.files import check_begun, write_whole
from rectiflow.guarded import Unreadable, read_json
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import generate_latents, initial_noise
from rectiflow.models.images import to_pil
from rectiflow.models.schedulers import SCHEDULERS
from rectiflow.progress import progress
from rectiflow.report import save_png

SETTINGS = "settings.json"
PICTURES = "pictures"


@dataclass(frozen=True)
class Run:
    """What is drawn, how, and where it goes."""

    data: Coco
    output: Path
    num_inference_steps: int
    guidance_scale: float
    solver: str
    """As in `generate_latents`."""
    seed: int = 0
    """The noise of picture i of the list is drawn from seed + i."""

    @property
    def settings_file(self) -> Path:
        """What the pictures were made with."""
        return self.output / SETTINGS

    def file(self, image: CocoImage) -> Path:
        """Of the picture drawn from an image's caption."""
        return self.output / PICTURES / f"{image.name}.png"

    @property
    def left(self) -> list[CocoImage]:
        """Those that are not drawn yet."""
        return [image for image in self.data.images if not self.file(image).is_file()]


@dataclass(frozen=True)
class Sitting:
    """What one call of `make_pictures` did."""

    made: int
    left: int
    """Of this run, of other shards."""
    seconds: float | None
    """Mean per picture, from caption to pixels, in batches; without the first batch (which warms
    up) if there were more. None if nothing was made."""


def make_pictures(
    model: FlowModel, run: Run, *, batch_size: int = 8, shard: tuple[int, int] = (1, 1)
) -> Sitting:
    """Draw every picture that is not there yet, at the model's own size.

    Which pictures go through the network together is fixed by their places in the list, so that
    a picture does not depend on an interruption or on the number of shards.

    Args:
        model: the network.
        run: what to do.
        batch_size: pictures that go through the network together. Another one can change the last
            bits of a picture, and nothing else.
        shard: (K, N): only the K-th of N shares of the batches, counted from 1, for machines that
            share a disk.

    Raises:
        InputError: the folder holds pictures of other settings, or a setting is wrong.
        WorkError: the network returned something that is not a number.
    """
    settings = _settings(model, run)
    if run.settings_file.exists():
        _compare(run, settings)
    number, shards = shard
    images = run.data.images
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    made, times = 0, []
    for batch in _progress(batches[number - 1 :: shards]):
        missing = [image for image in batch if not run.file(image).is_file()]
        if not missing:
            continue
        started = time.perf_counter()
        solution = generate_latents(
            model,
            [image.caption for image in batch],
            initial_noise(
                model,
                [run.seed + image.number for image in batch],
                model.default_size,
                model.default_size,
            ),
            num_inference_steps=run.num_inference_steps,
            guidance_scale=run.guidance_scale,
            solver=run.solver,
        )
        drawn = to_pil(model.decode(solution.x))
        times.append((time.perf_counter() - started, len(batch)))
        # Only now, so that a setting that is refused leaves nothing behind.
        _claim(run, settings)
        for image, picture in zip(batch, drawn, strict=True):
            if image in missing:
                record = {
                    "command": "evaluate coco",
                    "id": image.id,
                    **settings,
                    "prompt": image.caption,
                    "seed": run.seed + image.number,
                    "nfe": solution.nfe // len(batch),
                }
                save_png(picture, run.file(image), record)
        made += len(missing)
    timed = times[1:] or times
    seconds = sum(t for t, _ in timed) / sum(n for _, n in timed) if timed else None
    return Sitting(made, len(run.left), seconds)


def _settings(model: FlowModel, run: Run) -> dict[str, Any]:
    """What decides how a picture looks."""
    return {
        "model": model.name,
        "weight_hash": model.weight_hash,
        "field_hash": model.field_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_inference_steps": run.num_inference_steps,
        "guidance_scale": run.guidance_scale,
        # Solvers of diffusers stand on their own.
        "grid": None if run.solver in SCHEDULERS else model.default_grid,
        "method": run.solver,
        "height": model.default_size,
        "width": model.default_size,
        "first_seed": run.seed,
        "list_hash": run.data.list_hash,
    }


def _claim(run: Run, settings: dict[str, Any]) -> None:
    """Write down what makes the pictures, or see that it is what made those that are there."""
    file = run.settings_file
    if not file.exists():
        check_begun(run.output)
        run.output.mkdir(parents=True, exist_ok=True)
        # Shards begin at the same time, each with a file of its own.
        write_whole(file, json.dumps(settings, indent=2) + "\n", shared=True)
    _compare(run, settings)


def _compare(run: Run, settings: dict[str, Any]) -> None:
    try:
        known = read_json(run.settings_file)
    except Unreadable as error:
        raise InputError(
            f"{run.settings_file} is damaged: choose another folder with -o"
        ) from error
    # The name of a model is where it is now; its hash is what it is.
    differing = [key for key in settings if key != "model" and known.get(key) != settings[key]]
    if differing:
        raise InputError(
            f"{run.output} holds pictures of another {', '.join(differing).replace('_', ' ')} "
            f"(see {SETTINGS}): choose another folder with -o"
        )


def _progress(batches: Sequence[Sequence[CocoImage]]) -> Iterator[Sequence[CocoImage]]:
    return iter(progress(batches, desc="drawing", unit=" batches", leave=False))
