"""``rectiflow pairs inspect``: what is in a store of pairs, in figures and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rectiflow.app import options
from rectiflow.app.console import Session, one_line, session
from rectiflow.app.outputs import Outputs, Overwrite
from rectiflow.app.pairs import commands as commands
from rectiflow.app.suites import write_json
from rectiflow.errors import InputError, WorkError
from rectiflow.files import replacing

if TYPE_CHECKING:
    from PIL import Image

    from rectiflow.models.base import FlowModel
    from rectiflow.straighten.inspect import Inspection
    from rectiflow.straighten.reading import PairBatch, PairStore

SHEET, FIGURES = "pairs.png", "pairs.json"
COLUMNS = 4
LEAST_WIDTH = 128
"""Of a picture on the sheet: small ones are enlarged to about this."""
DECODED = 4
"""Latents decoded at a time."""


@commands.command(
    "inspect", epilog="\b\nExample:\n  rectiflow pairs inspect pairs -o inspection --model emoji-sd"
)
@options.takes_model(
    None,
    help="Whose codec makes the pictures.  [default: the store's teacher]",
    without=("dtype",),
)
def inspect_pairs(
    *,
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="A folder, or an address such as s3://bucket/pairs")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=f"Folder for {SHEET} and {FIGURES}.", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    model: options.ModelOptions,
    limit: Annotated[
        int, typer.Option(min=0, help="Pairs to take statistics of; 0 for all.")
    ] = 4096,
    as_json: options.AsJson = False,
) -> None:
    """Check a store of pairs, and say what is in it.

    Every file is read and compared with its checksum; the exit code is 1 if one is missing or
    damaged. With -o some pairs are drawn with their prompts, among them the longest and shortest.
    """
    with session(as_json) as terminal:
        from rectiflow.straighten.inspect import inspect

        if output is None:
            for name in model.given:
                raise InputError(f"--{name} is for pictures: say with -o where they go")
        if output is not None:
            outputs = Outputs(output, (SHEET, FIGURES), overwrite=overwrite)
        with _progress() as show:
            found = inspect(uri, limit=limit or None, progress=show)
        data = found.to_dict()
        lines = _table(found)
        if output is not None:
            pictures = _pictures(found, model, terminal)
            if pictures is not None:
                with replacing(outputs.file(SHEET)) as unfinished:
                    pictures.save(unfinished, format="PNG")
                lines.append(f"  {'pictures':11} {output / SHEET}")
            data["pictures"] = None if pictures is None else SHEET
        data["warnings"] = terminal.warnings
        if output is not None:
            write_json(outputs.file(FIGURES), data)
            outputs.finish()
        terminal.result(data, "\n".join(lines))
        if found.faults:
            rest = len(found.faults) - 1
            others = f" (and {rest} more of {found.manifest.num_shards} shards)" if rest else ""
            raise WorkError(found.faults[0] + others)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of shards."""
    from rectiflow.progress import progress

    with progress(desc="reading", unit=" shards", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _table(found: Inspection) -> list[str]:
    """What was found, a line for each matter."""
    from tqdm import tqdm

    made = found.manifest
    state = "complete" if found.complete else "not complete"
    if found.faults:
        state += f", {len(found.faults)} shards missing or damaged"
    guidance = f"guidance {made.guidance_scale:g}"
    rows = {
        "pairs": f"{found.pairs} of {made.num} in {found.shards} of {made.num_shards} shards, "
        f"{made.kind}",
        "teacher": f"{made.model} ({made.family}, weights {made.weight_hash[:12]}), {made.solver}, "
        f"{made.num_inference_steps} steps, {guidance}, {made.height} × {made.width} pixels",
        "computed": f"in {made.dtype} on {made.device}, {_versions(made.versions)}, "
        f"seeds {made.base_seed} to {made.base_seed + made.num - 1}",
    }
    if made.identity is None:
        rows["field"] = "not recorded: the teacher is known by its weights alone"
    else:
        rows["field"] = f"prediction_type {made.identity.get('scheduler.prediction_type')}"
    if found.other_versions:
        rows["versions"] = _others(found.other_versions)
    if found.pairs:
        least, most = found.pairs_per_prompt
        each = f"{least}" if least == most else f"{least} to {most}"
        rows |= {
            "bytes": f"{tqdm.format_sizeof(found.bytes, 'B', 1000)}, {found.bytes_per_pair:.0f} a "
            f"pair, of which {found.latent_bytes} are x_1",
            "prompts": f"{made.num_prompts}, {each} pairs each"
            + (
                f"; {_some(found.repeated_prompts)} listed repeatedly"
                * bool(found.repeated_prompts)
            ),
            "x_0": _channels(found.x_0.mean, found.x_0.std, found.x_0.not_finite),
            "x_1": _channels(found.x_1.mean, found.x_1.std, found.x_1.not_finite),
        }
    if found.noise is not None:
        noise = found.noise
        rows["noise"] = (
            f"norm {noise.norm:.4f}, kurtosis {noise.kurtosis:+.4f}, "
            f"autocorrelation {noise.autocorrelation:+.4f}"
        )
    if found.transport_cost:
        costs = ", ".join(f"{name} {cost}" for name, cost in found.transport_cost.items())
        rows["cost"] = f"{costs} (of {found.examined} pairs)"
        rows["longest"] = ", ".join(f"{index} ({cost:.3g})" for index, cost in found.longest)
        rows["shortest"] = ", ".join(f"{index} ({cost:.3g})" for index, cost in found.shortest)
    rows["same noise"] = _groups(found.duplicate_seeds, found.num_duplicate_seeds)
    rows["same image"] = _groups(found.duplicate_images, found.num_duplicate_images)
    lines = [f"{found.uri}: {state}", *(f"  {name:11} {text}" for name, text in rows.items())]
    lines += [f"  {'BAD':11} {one_line(fault)}" for fault in found.faults]
    return lines


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _others(made: dict[str, dict[str, str]]) -> str:
    """Which shards other versions made."""
    groups: dict[str, list[str]] = {}
    for shard, versions in made.items():
        groups.setdefault(_versions(versions), []).append(shard.removesuffix(".safetensors"))
    return "; ".join(f"{', '.join(shards)} by {versions}" for versions, shards in groups.items())


def _channels(mean: Sequence[float], std: Sequence[float], not_finite: int) -> str:
    each = " ".join(f"{m:+.3f}±{s:.3f}" for m, s in zip(mean, std, strict=True))
    more = f"; {not_finite} pairs are not finite" if not_finite else ""
    return f"mean±std per channel {each}{more}"


def _groups(groups: Sequence[Sequence[int]], too_many: int) -> str:
    if not groups:
        return "none"
    named = "; ".join(" = ".join(map(str, group[:6])) for group in groups[:4])
    return f"{too_many} pairs could go: {named}" + (" ..." if len(groups) > 4 else "")


def _some(repeated: dict[str, int]) -> str:
    return ", ".join(f"{prompt!r}" for prompt in list(repeated)[:3])


def _pictures(
    found: Inspection, chosen: options.ModelOptions, terminal: Session
) -> Image.Image | None:
    """The contact sheet; None, with a warning, where there is nothing to draw it from."""
    from rectiflow.report.sheet import contact_sheet
    from rectiflow.straighten.folder import Folder
    from rectiflow.straighten.reading import CACHE_BYTES, PairStore

    if not found.pairs:
        terminal.warn("no pictures: the store has no sound pair yet")
        return None
    model = _model(found, chosen, terminal)
    if model is None:
        return None
    marked = [
        *((index, "") for index in found.sample),
        *((index, f"longest, {cost:.3g}: ") for index, cost in found.longest),
        *((index, f"shortest, {cost:.3g}: ") for index, cost in found.shortest),
    ]
    store: PairStore = PairStore(Folder(found.uri), CACHE_BYTES)
    images, captions = [], []
    for start in range(0, len(marked), DECODED):
        part = marked[start : start + DECODED]
        batch: PairBatch = store.pairs([index for index, _ in part])
        decoded = model.decode(batch.x_1.to(model.device)).cpu()
        images += [image.permute(1, 2, 0).numpy() for image in decoded]
        captions += [
            f"{mark}{index} {prompt}"
            for (index, mark), prompt in zip(part, batch.prompts, strict=True)
        ]
    scale = max(1, round(LEAST_WIDTH / found.manifest.width))
    return contact_sheet(images, columns=COLUMNS, scale=scale, captions=captions)


def _model(found: Inspection, chosen: options.ModelOptions, terminal: Session) -> FlowModel | None:
    """Whose codec the latents are of."""
    import torch

    made = found.manifest
    try:
        model = chosen.load(chosen.model or made.model, dtype=getattr(torch, made.dtype))
        shape = model.latent_shape(made.height, made.width)
        if tuple(shape) != tuple(made.latent_shape):
            raise InputError(
                f"{model.name} has latents of {list(shape)} and the store of "
                f"{list(made.latent_shape)}: name the store's teacher, {made.model}"
            )
    except InputError as error:
        if chosen.model is not None:
            raise
        terminal.warn(f"no pictures: {error}; or name a model with --model")
        return None
    if model.weight_hash != made.weight_hash:
        terminal.warn(
            f"{model.name} has other weights than the store's teacher: colours may be off in the "
            "pictures"
        )
    return model
