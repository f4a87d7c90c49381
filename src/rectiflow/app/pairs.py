"""``rectiflow pairs``: noise and what a teacher makes of it, in a store that training reads."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options, pair_prompts, run_options
from rectiflow.app.console import session
from rectiflow.app.loudness import Commands
from rectiflow.errors import InputError
from rectiflow.stopping import time_limit

if TYPE_CHECKING:
    from rectiflow.straighten.pair_maker import PairsMade

commands = Commands(rich_markup_mode=None)
"""`rectiflow pairs` itself, and its subcommands."""


@commands.callback(
    invoke_without_command=True,
    epilog="\b\nExample:\n  rectiflow pairs --model emoji-sd --prompts emoji:2000 --out pairs\n"
    "  torchrun --nproc_per_node 2 -m rectiflow -- pairs --prompts prompts.txt --out pairs",
)
@options.takes_model()
def pairs(
    *,
    context: typer.Context,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE[:COLUMN]",
            help="A .txt file with a prompt on each line; .csv, .tsv, .json, .jsonl or .parquet; a "
            "data set of the hub (owner/name); emoji:COUNT for captions of the embedded world.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="URI", help="A folder, or an address such as s3://bucket/pairs."
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            "--num",
            "-n",
            min=1,
            help="Pairs; pair i has prompt i, over and over.  [default: one each]",
        ),
    ] = None,
    model: options.ModelOptions,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0, help="Classifier-free guidance; up to 1 is none.  [default: 5; with --images 1]"
        ),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What guidance pushes away from.", show_default=False)
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="dpmpp, unipc or ddim of diffusion models; euler, midpoint, heun, rk4, ab2 or "
            "dopri5 of all.  [default: dpmpp, for flow models euler, with --images rk4]"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps from noise to image.")] = 25,
    size: Annotated[
        str | None,
        typer.Option(metavar="PIXELS", help="512, or HEIGHTxWIDTH.  [default: the model's]"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=options.LARGEST_SEED // 2, help="Pair i has SEED + i.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in the network together.")] = 16,
    shard_size: Annotated[int, typer.Option(min=1, help="Pairs in a file.")] = 1024,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Make pairs of real images and their inversions: a folder of pictures, each with "
            "its caption in a .txt file beside it, or a .csv with columns image,prompt.",
            show_default=False,
        ),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Make the shards of the K-th of N writers, 1/N to N/N.  [default: as torchrun "
            "says, else 1/1]",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the CPU; all writers use the same.  [default: the store's, or all]"
        ),
    ] = None,
    keep_seconds: Annotated[
        float, typer.Option(min=0, help="Keep the pairs of an unfinished file this often.")
    ] = 30.0,
    max_minutes: run_options.MaxMinutes = None,
    other_versions: Annotated[
        bool,
        typer.Option(
            "--allow-other-versions",
            help="Make what is missing also with other versions of torch or diffusers than the "
            "store was begun with; each such file says so.",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make pairs of noise and images for reflow and distillation.

    The same command again goes on where it stopped, whatever stopped it; after SIGTERM, SIGUSR1,
    Ctrl-C or --max-minutes the exit code is 75. Several may write one store: give each its
    --worker, or start them with torchrun.
    """
    if context.invoked_subcommand is not None:
        return
    with session(as_json, resumable=True) as terminal:
        from rectiflow.straighten.folder import Folder
        from rectiflow.straighten.pair_maker import make_pairs
        from rectiflow.straighten.store_writer import existing_manifest

        if out is None:
            raise InputError("--out is missing: say where the pairs go")
        options.check_finite("--guidance", guidance)
        number, count = _worker(worker)
        height, width = _size(size)
        files, captions = _sources(prompts, images, num)
        existing_manifest(Folder(out))  # before anything heavy is loaded
        started = time.perf_counter()
        loaded = dataclasses.replace(model, device=_device(model.device)).load()
        from rectiflow.models.memory import out_of_memory_explained

        with (
            time_limit(max_minutes),
            out_of_memory_explained(loaded),
        ):
            done = make_pairs(
                loaded,
                captions,
                out,
                num=num,
                guidance_scale=(1.0 if files else 5.0) if guidance is None else guidance,
                negative_prompt=negative,
                solver=solver,
                num_inference_steps=steps,
                height=height,
                width=width,
                seed=seed,
                shard_size=shard_size,
                batch_size=batch_size,
                images=files,
                threads=threads,
                worker=number,
                num_workers=count,
                keep_seconds=keep_seconds,
                other_versions=other_versions,
                on_event=terminal.warn,
            )
        seconds = time.perf_counter() - started
        if worker is None and number > 0:
            return  # torchrun's first process speaks for all
        data = _result(done, number, count, seconds) | {"warnings": terminal.warnings}
        terminal.result(data, _words(data))


def _sources(
    prompts: str | None, images: Path | None, num: int | None
) -> tuple[list[Path] | None, list[str]]:
    if images is not None:
        if prompts is not None:
            raise InputError("--images come with their own captions: leave out --prompts")
        return pair_prompts.images_of(images)
    if prompts is None:
        raise InputError("--prompts is missing: give a file, a data set, or emoji:1000")
    return None, pair_prompts.prompts_of(prompts, num)


def _worker(text: str | None) -> tuple[int, int]:
    """Which writer this is, from 0, and how many there are."""
    if text is None:
        from rectiflow.straighten.launched import place

        return place()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--worker {text}: give K/N with K from 1 to N, such as 1/3")
    return int(match[1]) - 1, int(match[2])


def _device(given: str | None) -> str | None:
    """Of torchrun's processes each has an accelerator of its own, if there are any."""
    import torch

    from rectiflow.straighten.launched import place

    place()
    rank = os.environ.get("LOCAL_RANK")
    if given is None and rank is not None and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return f"{kind.type}:{int(rank) % torch.accelerator.device_count()}"
    return given


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise InputError(f"--size {text}: give pixels, such as 512, or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def _result(done: PairsMade, worker: int, num_workers: int, seconds: float) -> dict[str, Any]:
    return {
        "store": done.uri,
        "complete": done.complete,
        "num": done.manifest.num,
        "shards": done.manifest.num_shards,
        "worker": worker + 1,
        "num_workers": num_workers,
        "pairs": done.total,
        "made": done.made,
        "remade": list(done.remade),
        "bytes": done.bytes,
        "bytes_per_pair": done.bytes / done.total if done.total else 0.0,
        "seconds": seconds,
        "settings": done.manifest.model_dump(mode="json"),
    }


def _words(data: dict[str, Any]) -> str:
    from tqdm import tqdm

    size = tqdm.format_sizeof(data["bytes"], "B", 1000)
    made = f"{data['made']} made now in {data['seconds']:.1f} s"
    if data["complete"]:
        return f"{data['store']}: {data['num']} pairs, complete ({made}; {size} of this writer's)"
    return (
        f"{data['store']}: the {data['pairs']} pairs of writer {data['worker']} of "
        f"{data['num_workers']} are there ({made}, {size}); the store waits for the others"
    )
