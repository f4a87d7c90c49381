"""PIE-Bench: editing its pictures, in any number of processes and sittings, and measuring.

Results lie below ``OUTPUT/PRESET/annotation_images`` as the sources do below theirs, as PNG, each
written whole or not at all; what exists is not made again. ``OUTPUT/PRESET/settings.json`` says
what made them, and nothing made otherwise is ever put beside them.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rectiflow.errors import InputError, WorkError
from rectiflow.evaluate.pie_bench_data import KINDS, PICTURES, PieBench, PieEdit
from rectiflow.evaluate.pie_bench_metrics import VARIANTS, Networks, Scores, score, summarise
from rectiflow.files import check_begun, write_csv, write_whole
from rectiflow.guarded import Unreadable, read_json
from rectiflow.invert import Preset
from rectiflow.models.base import FlowModel
from rectiflow.models.images import to_tensor
from rectiflow.models.load import load
from rectiflow.models.picture import load_image
from rectiflow.progress import progress
from rectiflow.report import read_png, save_png
from rectiflow.steer import edit
from rectiflow.stopping import with_workers

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Run:
    """One method over the benchmark, and where its results go."""

    data: PieBench
    preset: Preset
    name: str
    """The method's, and its folder's."""
    output: Path

    @property
    def folder(self) -> Path:
        """Of this method."""
        return self.output / self.name

    def result(self, entry: PieEdit) -> Path:
        """The file of a result."""
        return self.folder / PICTURES / entry.path.with_suffix(".png")

    @property
    def left(self) -> list[PieEdit]:
        """Edits whose results are not there yet."""
        return [entry for entry in self.data.edits if not self.result(entry).is_file()]


def make_results(
    model: FlowModel, run: Run, *, workers: int = 1, shard: tuple[int, int] = (1, 1)
) -> list[PieEdit]:
    """Edit every picture that has no result yet.

    A picture is edited by itself, so its result depends on no other and on no interruption.
    (Several workers share the threads; their number can change the last bits of a result.)

    Args:
        model: the network; with more workers, each loads its own copy by `model.name`.
        run: what to do.
        workers: processes on this machine, this one included.
        shard: (I, N): only the I-th of N shares, counted from 1, for machines that share a disk.

    Returns:
        Edits that are left, of other shards.

    Raises:
        InputError: the folder holds results of other settings.
        WorkError: a worker died.
    """
    _claim(model, run)
    number, shards = shard
    # A share is fixed by the place in the mapping file, whatever is done already.
    mine = run.data.edits[number - 1 :: shards]
    shares = [mine[worker::workers] for worker in range(workers)]
    if workers == 1:
        _edit_all(model, run, mine)
        return run.left
    told = model.loaded_with | {"dtype": model.dtype, "device": str(model.device)}
    settings = (model.name, told, model.weight_hash)
    threads = torch.get_num_threads()
    each = max(1, threads // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers - 1, mp_context=context) as pool, with_workers():
        others: list[Future[None]] = [
            pool.submit(_work, settings, run, share, each) for share in shares[1:]
        ]
        try:
            torch.set_num_threads(each)
            _edit_all(model, run, shares[0])
            for other in others:
                other.result()
        except BrokenProcessPool as error:
            raise WorkError(
                "a worker was killed (by lack of memory?): run the same command again, with fewer "
                "--workers, and it goes on where it was"
            ) from error
        finally:
            torch.set_num_threads(threads)
    return run.left


def measure(
    run: Run, networks: Networks, variants: Sequence[str] = VARIANTS
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute all metrics of a run whose results are complete.

    Returns:
        The figures, ``{"method", "n", "missing", "nfe", "warned", "quirk", "corrected", "kinds"}``
        with settings.json's beside them, and a row per picture.
    """
    scores: list[Scores] = []
    rows: list[dict[str, Any]] = []
    for entry in _progress(run.data.edits, "measuring"):
        made = _made(run.result(entry))
        scores.append(_score(run, entry, networks, variants))
        row = {"id": entry.id, "kind": entry.kind, "nfe": made["nfe"], "warnings": made["warned"]}
        rows.append(row | _flat(scores[-1]))
    by_kind = {
        str(kind): [found for found, row in zip(scores, rows, strict=True) if row["kind"] == kind]
        for kind in range(len(KINDS))
    }
    figures = {
        "method": run.name,
        **read_json(run.folder / SETTINGS),
        "n": len(rows),
        "missing": networks.missing,
        "nfe": float(np.mean([row["nfe"] for row in rows])),
        "warned": sum(bool(row["warnings"]) for row in rows),
        **summarise(scores),
        "kinds": {
            kind: {"name": KINDS[int(kind)], "n": len(found), **summarise(found)}
            for kind, found in by_kind.items()
            if found
        },
    }
    return figures, rows


def write_tables(run: Run, figures: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write ``per-image.csv`` and ``per-kind.csv`` into the method's folder; their paths."""
    groups = [
        *((kind, found["name"], found) for kind, found in figures["kinds"].items()),
        ("all", "", figures),
    ]
    kinds = []
    for kind, name, found in groups:
        row = {"kind": kind, "name": name, "n": found["n"]}
        for variant in [variant for variant in VARIANTS if variant in figures]:
            for metric, value in found[variant].items():
                row[f"{variant}_{metric}"] = value["mean"]
                row[f"{variant}_{metric}_n"] = value["n"]
        kinds.append(row)
    files = [run.folder / "per-image.csv", run.folder / "per-kind.csv"]
    for file, table in zip(files, (rows, kinds), strict=True):
        write_csv(file, table)
    return files


def _claim(model: FlowModel, run: Run) -> None:
    """Write down what makes the results, or see that it is what made those that are there."""
    settings = {
        "model": model.name,
        "weight_hash": model.weight_hash,
        "field_hash": model.field_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "preset": dataclasses.asdict(run.preset),
        "mapping_hash": run.data.mapping_hash,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    file = run.folder / SETTINGS
    if not file.exists():
        check_begun(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        # Shards begin at the same time, each with a file of its own.
        write_whole(file, text, shared=True)
    try:
        known = read_json(file)
    except Unreadable as error:
        raise InputError(f"{file} is damaged: choose another folder with -o") from error
    wanted = json.loads(text)
    # The name of a model is where it is now; its hash is what it is.
    differing = [key for key in wanted if key != "model" and known.get(key) != wanted[key]]
    if differing:
        raise InputError(
            f"{run.folder} holds results of another {', '.join(differing).replace('_', ' ')} "
            f"(see {SETTINGS}): choose another folder with -o"
        )


def _work(
    settings: tuple[str, dict[str, Any], str], run: Run, share: Sequence[PieEdit], threads: int
) -> None:
    """What another process does."""
    name, told, weight_hash = settings
    torch.set_num_threads(threads)
    model = load(name, **told)
    if model.weight_hash != weight_hash:
        raise InputError(
            f"{name} has changed while it was in use: use --workers 1, or load it anew"
        )
    _edit_all(model, run, share)


def _edit_all(model: FlowModel, run: Run, share: Sequence[PieEdit]) -> None:
    parent = multiprocessing.parent_process()
    for entry in _progress([e for e in share if not run.result(e).is_file()], "editing"):
        if parent is not None and not parent.is_alive():
            return  # it was killed, and may be running again by now
        # Noise, where a method draws any, is an item's own: it depends on no other item.
        seed = run.preset.noise_seed + entry.number
        preset = dataclasses.replace(run.preset, noise_seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the result has them all, in full
            result = edit(
                model,
                entry.picture,
                source_prompt=entry.source_prompt,
                prompts=[entry.target_prompt],
                preset=preset,
            )
        made = {
            "command": "evaluate pie-bench",
            "id": entry.id,
            "model": model.name,
            "weight_hash": model.weight_hash,
            "source_prompt": entry.source_prompt,
            "prompts": [entry.target_prompt],
            "settings": dataclasses.asdict(preset),
            "nfe": result.nfe["total"],
            "warned": result.warnings,
        }
        save_png(result.images[0], run.result(entry), made)


def _made(file: Path) -> dict[str, Any]:
    made = read_png(file)
    if not {"nfe", "warned"} <= set(made):
        raise InputError(f"{file} was not written by this evaluation: delete it and run again")
    return made


def _score(run: Run, entry: PieEdit, networks: Networks, variants: Sequence[str]) -> Scores:
    source, result = (to_tensor(load_image(f)) for f in (entry.picture, run.result(entry)))
    if source.shape != result.shape:
        raise InputError(f"{run.result(entry)} has another size: delete it and run again")
    mask = torch.from_numpy(entry.mask())[None, None]
    return score(networks, source, result, mask, entry.target_prompt, variants)


def _flat(scores: Scores) -> dict[str, float | None]:
    """A row's cells; empty where a picture has no background."""
    return {
        f"{variant}_{name}": None if np.isnan(value) else value
        for variant, found in scores.items()
        for name, value in found.items()
    }


def _progress(entries: Sequence[PieEdit], what: str) -> Iterator[PieEdit]:
    return iter(progress(entries, desc=what, unit=" pictures", leave=False))
