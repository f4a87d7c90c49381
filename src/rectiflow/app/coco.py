"""``rectiflow evaluate coco``: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rectiflow.app import options
from rectiflow.app.console import Session, session
from rectiflow.app.suites import BatchSize, Limit, Output, Shard, share_of, write_json
from rectiflow.errors import InputError

BATCH = 8


def _make_data(terminal: Session, folder: Path, limit: int | None) -> None:
    """Write scenes of the emoji world as a COCO folder."""
    from rectiflow.evaluate.coco_emoji import make_emoji_coco

    n = 1000 if limit is None else limit
    make_emoji_coco(options.output_folder(folder), n)
    terminal.result({"data": str(folder), "n": n}, f"{n} pictures with captions in {folder}")


@options.takes_model()
def coco(
    *,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with annotations/ and val2017/ or val2014/.", show_default=False),
    ] = None,
    output: Output = None,
    limit: Limit = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="val2017 or val2014. By default the one that is there.", show_default=False
        ),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            help="Text file of image ids, one a line, in place of the usual 5000 or 30000.",
            show_default=False,
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Table (.csv, .tsv, .jsonl, .json) of image_id and caption, in place of the "
            "folder's own; an image may come more than once.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="From noise to image.", show_default=False)
    ] = None,
    guidance: options.Guidance = None,
    solver: Annotated[
        str | None, typer.Option(help="As in `rectiflow generate`.", show_default=False)
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=options.LARGEST_SEED // 2,
            help="Of the first picture's noise; picture i has seed + i.",
        ),
    ] = 0,
    batch_size: BatchSize = BATCH,
    shard: Shard = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a CLIP: laion/CLIP-ViT-g-14-laion2B-s12B-b42K for published "
            "figures, emoji-clip for the emoji world.",
            show_default=False,
        ),
    ] = None,
    inception_weights: Annotated[
        Path | None,
        typer.Option(
            help="torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for FID.",
            show_default=False,
        ),
    ] = None,
    make_data: Annotated[
        Path | None,
        typer.Option(
            help="Write such a folder of --limit scenes of the emoji world, nothing else.",
            show_default=False,
        ),
    ] = None,
    model: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Measure a model on COCO's captions, in several sittings.

    Pictures that are there are not drawn again; when all are, they are measured.
    """
    with session(as_json, resumable=True) as terminal:
        if make_data is not None:
            _make_data(terminal, make_data, limit)
            return
        if data is None:
            raise InputError("coco needs --data, the folder with annotations/ and val2017/ in it")
        if output is None:
            raise InputError("coco needs -o, a folder for the pictures")
        options.check_finite("--guidance", guidance)
        share = share_of(shard)
        from rectiflow.evaluate.coco import Run, make_pictures
        from rectiflow.evaluate.coco_data import SPLITS, read_coco
        from rectiflow.evaluate.coco_list import read_captions, read_ids
        from rectiflow.evaluate.coco_metrics import FEWEST, load_networks, measure, write_tables

        if split not in (None, *SPLITS):
            raise InputError(f"--split is {split!r}: give {' or '.join(SPLITS)}")
        if ids is not None and captions is not None:
            raise InputError("--captions has ids of its own: leave out --ids")
        pictures = read_coco(
            data,
            split,
            None if ids is None else read_ids(ids),
            None if captions is None else read_captions(captions),
        ).first(limit)
        n = len(pictures.images)
        if n < FEWEST:
            raise InputError(f"{n} pictures say nothing: give {FEWEST} or more")
        options.output_folder(output)
        loaded = model.load()
        # Before the pictures are drawn: a network that cannot be loaded is found at once.
        networks = load_networks(inception_weights, clip, loaded.device)
        run = Run(
            pictures,
            output,
            num_inference_steps=steps or loaded.default_num_inference_steps,
            guidance_scale=loaded.default_guidance_scale if guidance is None else guidance,
            solver=solver or loaded.default_solver,
            seed=seed,
        )
        batch_size = batch_size or BATCH
        sitting = make_pictures(loaded, run, batch_size=batch_size, shard=share or (1, 1))
        latency = {
            "made": sitting.made,
            "seconds_per_picture": sitting.seconds,
            "batch_size": batch_size,
            "device": str(loaded.device),
        }
        if share is not None:
            terminal.result(
                {"shard": list(share), "done": n - sitting.left, "left": sitting.left, **latency},
                f"{n - sitting.left} of {n} pictures are there; when all are, the same command "
                "without --shard measures them",
            )
            return
        figures, rows = measure(run, networks)
        for found in figures["metrics"].values():
            if "caution" in found:
                terminal.warn(f"{found['title']}: {found['caution']}")
        figures |= {"sitting": latency, "warnings": terminal.warnings}
        write_tables(run, figures, rows)
        write_json(output / "figures.json", figures)
        terminal.result(figures, summary(figures))


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
