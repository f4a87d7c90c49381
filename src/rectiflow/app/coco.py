"""``rectiflow evaluate coco``: its options, and what it prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options
from rectiflow.app.console import Session, json_text
from rectiflow.app.pie_bench import _shard
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.evaluate.coco import Run
    from rectiflow.models.base import FlowModel

BATCH = 8

Split = Annotated[
    str | None,
    typer.Option(
        help="coco: val2017 or val2014. By default the one that is there.", show_default=False
    ),
]
Ids = Annotated[
    Path | None,
    typer.Option(
        help="coco: text file of image ids, one a line, in place of the usual 5000 or 30000.",
        show_default=False,
    ),
]
InceptionWeights = Annotated[
    Path | None,
    typer.Option(
        "--inception-weights",
        help="coco: torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for FID.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="coco: from noise to image.", show_default=False),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", help="coco: classifier-free guidance; 1 is none.", show_default=False
    ),
]
Solver = Annotated[
    str | None,
    typer.Option(help="coco: as in `rectiflow generate`.", show_default=False),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=options.LARGEST_SEED // 2,
        help="coco: of the first picture's noise; picture i has seed + i. By default 0.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class CocoOptions:
    """The options that coco takes, as they were given."""

    data: Path | None = None
    make_data: Path | None = None
    split: str | None = None
    ids: Path | None = None
    shard: str | None = None
    batch_size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None
    seed: int | None = None
    clip: str | None = None
    inception_weights: Path | None = None


def make_data(terminal: Session, folder: Path, limit: int | None) -> None:
    """Write scenes of the emoji world as a COCO folder."""
    from rectiflow.evaluate.coco_emoji import make_emoji_coco

    n = 1000 if limit is None else limit
    make_emoji_coco(options.output_folder(folder), n)
    terminal.result({"data": str(folder), "n": n}, f"{n} pictures with captions in {folder}")


def coco(
    terminal: Session,
    given: CocoOptions,
    *,
    model: str,
    dtype: options.Dtype,
    device: str | None,
    output: Path | None,
    limit: int | None,
) -> None:
    """Draw what pictures are missing, then measure all of them."""
    if given.make_data is not None:
        make_data(terminal, given.make_data, limit)
        return
    if given.data is None:
        raise InputError("coco needs --data, the folder with annotations/ and val2017/ in it")
    if output is None:
        raise InputError("coco needs -o, a folder for the pictures")
    options.check_finite("--guidance", given.guidance)
    share = _shard(given.shard)
    from rectiflow.evaluate.coco import make_pictures
    from rectiflow.evaluate.coco_data import SPLITS, read_coco, read_ids
    from rectiflow.evaluate.coco_metrics import FEWEST, load_networks, measure, write_tables

    if given.split not in (None, *SPLITS):
        raise InputError(f"--split is {given.split!r}: give {' or '.join(SPLITS)}")
    ids = None if given.ids is None else read_ids(given.ids)
    data = read_coco(given.data, given.split, ids).first(limit)
    if len(data.images) < FEWEST:
        raise InputError(f"{len(data.images)} pictures say nothing: give {FEWEST} or more")
    options.output_folder(output)
    loaded = options.load_model(model, dtype, device)
    # Before the pictures are drawn: a network that cannot be loaded is found at once.
    networks = load_networks(given.inception_weights, given.clip, loaded.device)
    run = _run(loaded, given, data, output)
    batch_size = given.batch_size or BATCH
    sitting = make_pictures(loaded, run, batch_size=batch_size, shard=share or (1, 1))
    latency = {
        "made": sitting.made,
        "seconds_per_picture": sitting.seconds,
        "batch_size": batch_size,
        "device": str(loaded.device),
    }
    n = len(data.images)
    if share is not None:
        terminal.result(
            {"shard": list(share), "done": n - sitting.left, "left": sitting.left, **latency},
            f"{n - sitting.left} of {n} pictures are there; when all are, the same command "
            "without --shard measures them",
        )
        return
    figures, rows = measure(run, networks)
    figures |= {"sitting": latency}
    write_tables(run, figures, rows)
    file = output / "figures.json"
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(json_text(figures) + "\n", encoding="utf-8")
    unfinished.replace(file)
    terminal.result(figures, summary(figures))


def _run(model: FlowModel, given: CocoOptions, data: Any, output: Path) -> Run:
    """The options, with what the model says where they are silent."""
    from rectiflow.evaluate.coco import Run

    return Run(
        data,
        output,
        num_inference_steps=given.steps or model.default_num_inference_steps,
        guidance_scale=(model.default_guidance_scale if given.guidance is None else given.guidance),
        solver=given.solver or model.default_solver,
        seed=given.seed or 0,
    )


def summary(figures: dict[str, Any]) -> str:
    """A line per metric, those left out too, under a line that says what was drawn."""
    lines = [
        f"{figures['model']}: {figures['n']} pictures of {figures['split']}, "
        f"{figures['num_inference_steps']} steps of {figures['method']}, guidance "
        f"{figures['guidance_scale']:g}, {figures['nfe']:g} network samples each"
    ]
    seconds = figures["sitting"]["seconds_per_picture"]
    if seconds is not None:
        lines[0] += f", {seconds:.3g} s a picture"
    for found in figures["metrics"].values():
        value = f"{found['value']:.4g}"
        if "interval" in found:
            low, high = found["interval"]
            value += f" ({low:.4g} to {high:.4g}; the references {found['references']:.4g})"
        lines.append(f"{found['title']}: {value}")
    lines += [f"{name}: left out: {reason}" for name, reason in figures["left_out"].items()]
    return "\n".join(lines)
