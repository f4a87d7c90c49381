"""Checkpoints: complete or absent, never half written, and never pickle.

A checkpoint is a folder ``checkpoint-STEP`` of safetensors files and their checksums. It is
written under a temporary name, forced to the disk and renamed, so a killed run, or one whose disk
is full, finds either the whole of it or nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rectiflow.checksums import CHECKSUMS, verify, write_checksums
from rectiflow.errors import InputError, WorkError
from rectiflow.files import readable_alike
from rectiflow.guarded import Unreadable, parse_json, read_tensors


def flatten(
    state: Any, prefix: str = "", seen: dict[Any, str] | None = None
) -> tuple[dict[str, torch.Tensor], Any]:
    """Split nested dicts and lists into their tensors and a JSON skeleton that refers to them.

    A tensor that is there twice (tied weights) is kept once and referred to twice.
    """
    seen = {} if seen is None else seen
    if isinstance(state, torch.Tensor):
        tensor = state.detach()
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and same in seen:
            return {}, {"tensor": seen[same]}
        seen[same] = prefix
        tensor = tensor.cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # a part of something larger
            tensor = tensor.clone()
        return {prefix: tensor}, {"tensor": prefix}
    if isinstance(state, dict):
        tensors: dict[str, torch.Tensor] = {}
        items = []
        for key, value in state.items():
            found, skeleton = flatten(value, f"{prefix}/{key}", seen)
            tensors |= found
            items.append([key, skeleton])
        return tensors, {"dict": items}
    if isinstance(state, list | tuple):
        tensors, skeletons = {}, []
        for index, value in enumerate(state):
            found, skeleton = flatten(value, f"{prefix}/{index}", seen)
            tensors |= found
            skeletons.append(skeleton)
        return tensors, {"list": skeletons}
    return {}, {"value": state}


def unflatten(tensors: dict[str, torch.Tensor], skeleton: Any) -> Any:
    """The inverse of `flatten`; tuples come back as lists."""
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(tensors, part) for key, part in content}
    if kind == "list":
        return [unflatten(tensors, part) for part in content]
    return content


def save(run: Path, step: int, state: dict[str, Any], keep_last: int) -> Path:
    """Write ``checkpoint-STEP`` from a dict of state dicts; drop all but the newest `keep_last`.

    Raises:
        WorkError: it could not be written (a full disk); the checkpoints before it are untouched.
    """
    final = run / f"checkpoint-{step}"
    temporary = run / f".checkpoint-{step}.tmp"
    tidy(run)
    try:
        temporary.mkdir(parents=True)
        for name, part in state.items():
            tensors, skeleton = flatten(part)
            file = temporary / f"{name}.safetensors"
            # One metadata key: safetensors writes several in a random order.
            save_file(tensors, file, {"skeleton": json.dumps(skeleton)})
        write_checksums(temporary)
        readable_alike(temporary)
        for file in temporary.iterdir():
            _to_disk(file)
        _to_disk(temporary)
        if final.exists():  # moved aside, not removed: a kill here must not leave half of it
            os.replace(final, run / f".checkpoint-{step}.old")
        os.replace(temporary, final)
        _to_disk(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        why = error.strerror if isinstance(error, OSError) else str(error).rpartition(": ")[2]
        there = checkpoints(run)
        kept = f"{there[-1].name} is untouched" if there else "there was none before it"
        raise WorkError(
            f"cannot write {final} ({why}): {kept}; make room on the disk and go on with the "
            "same command"
        ) from error
    shutil.rmtree(run / f".checkpoint-{step}.old", ignore_errors=True)
    for old in checkpoints(run)[:-keep_last]:
        _remove(old)
    return final


def load(checkpoint: Path) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        InputError: a file is missing, cut short, or not what was written.
    """
    state = {}
    try:
        if not verify(checkpoint):
            raise Unreadable(checkpoint / CHECKSUMS, "is missing")
        for file in sorted(checkpoint.glob("*.safetensors")):
            tensors, texts = read_tensors(file)
            state[file.stem] = unflatten(tensors, parse_json(texts["skeleton"], file))
    except Unreadable as error:
        raise _damaged(checkpoint, str(error).removeprefix(f"{checkpoint}/")) from error
    # Files that were written whole, but not by us.
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(checkpoint, f"it is none of ours: {error!r}") from error
    return state


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r".*-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was written at, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def resolve(run: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: ``latest``, a folder name, or None for a fresh start.

    Raises:
        InputError: the named checkpoint is not there.
    """
    if wanted is None:
        return None
    _put_back(run)
    found = checkpoints(run)
    if wanted == "latest":
        return found[-1] if found else None
    if run / wanted not in found:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"no checkpoint {wanted!r} in {run}; there are: {names}")
    return run / wanted


def to_go_on_from(run: Path, wanted: str | None, steps: int) -> Path | None:
    """As `resolve`, for a run of so many steps.

    Raises:
        InputError: the named checkpoint is not there, or the run is past that many steps.
    """
    found = resolve(run, wanted)
    if found is not None and step_of(found) > steps:
        raise InputError(
            f"{run} has taken {step_of(found)} steps, and {steps} are asked for: give at least "
            f"{step_of(found)}, go back with --resume_from_checkpoint to one of "
            f"{', '.join(path.name for path in checkpoints(run))}, or choose another folder with -o"
        )
    return found


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints later than a step: the run goes another way from there."""
    for later in checkpoints(run):
        if step_of(later) > step:
            _remove(later)


def tidy(run: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    _put_back(run)
    for leftover in [*run.glob(".checkpoint-*.tmp"), *run.glob(".checkpoint-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _put_back(run: Path) -> None:
    """A checkpoint that was moved aside for one that never came is itself again."""
    for aside in run.glob(".checkpoint-*.old"):
        final = run / aside.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            os.replace(aside, final)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, under another name first: half of one must not look like one."""
    leaving = checkpoint.with_name(f".{checkpoint.name}.tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    os.replace(checkpoint, leaving)
    shutil.rmtree(leaving)


def _damaged(checkpoint: Path, why: str) -> InputError:
    return InputError(
        f"the checkpoint {checkpoint} is damaged ({why}): remove its folder to go on from the one "
        "before"
    )


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
