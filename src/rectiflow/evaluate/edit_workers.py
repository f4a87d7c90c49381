"""Several processes before the benchmark of edits, each with a share of the methods.

They leave their results in the benchmark's folder, from which whoever started them assembles.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rectiflow.errors import InputError, WorkError
from rectiflow.evaluate.emoji_edits import Benchmark, Masks, cases
from rectiflow.evaluate.emoji_models import load_clip
from rectiflow.invert.presets import Preset
from rectiflow.models.load import load
from rectiflow.stopping import with_workers

Job = tuple[str, str | Preset]
"""What to call a method, and the method."""


@dataclass(frozen=True)
class _Described:
    """A benchmark in words, for another process to make its own."""

    model: str
    loaded_with: dict[str, Any]
    dtype: torch.dtype
    device: str
    weight_hash: str
    folder: Path
    clip: Path | None
    first_seed: int
    batch_size: int
    masks: Masks
    reconstruct: bool


def work_ahead(
    bench: Benchmark, jobs: Sequence[Job], n: int | None, processes: int, clip: Path | None = None
) -> None:
    """Have the first n results of methods made by processes of their own; 1 process does nothing.

    Args:
        bench: with a folder.
        jobs: dealt out in turn.
        n: edits for each; all when None.
        processes: each loads the model by its name.
        clip: the folder of the benchmark's CLIP, if it has one.

    Raises:
        InputError: there is no folder, or the model is not the one of that name any more.
        WorkError: a process died.
    """
    if processes == 1:
        return
    if bench.folder is None:
        raise InputError("several processes need a folder for what they make: give -o DIR")
    described = _Described(
        model=bench.model.name,
        loaded_with=bench.model.loaded_with,
        dtype=bench.model.dtype,
        device=str(bench.model.device),
        weight_hash=bench.model.weight_hash,
        folder=bench.folder,
        clip=clip,
        first_seed=bench.first_seed,
        batch_size=bench.batch_size,
        masks=bench.masks,
        reconstruct=bench.reconstruct,
    )
    shares = [share for i in range(processes) if (share := jobs[i::processes])]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(shares), mp_context=context) as pool, with_workers():
        running = [pool.submit(_work, described, share, n) for share in shares]
        try:
            for one in running:
                one.result()
        except BrokenProcessPool as error:
            raise WorkError(
                "a process was killed (by lack of memory?): run the same command again, with fewer "
                "--processes, and it goes on where it was"
            ) from error


def _work(described: _Described, jobs: Sequence[Job], n: int | None) -> None:
    """What another process does."""
    model = load(
        described.model,
        dtype=described.dtype,
        device=described.device,
        **described.loaded_with,
    )
    if model.weight_hash != described.weight_hash:
        raise InputError(f"{described.model} has changed while it was in use: use --processes 1")
    bench = Benchmark(
        model,
        described.folder,
        load_clip(described.clip) if described.clip else None,
        described.first_seed,
        described.batch_size,
        described.masks,
        described.reconstruct,
    )
    parent = multiprocessing.parent_process()
    edits = cases(n, bench.first_seed)
    for name, method in jobs:
        if parent is not None and not parent.is_alive():
            return  # it was killed, and may be running again by now
        bench.run(edits, method, name)
