"""Checkpoints: complete or absent, never half written, and never pickle.

A checkpoint is a folder ``checkpoint-STEP`` of safetensors files. It is written under a temporary
name and renamed, so a killed run finds either the whole of it or nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rectiflow.errors import InputError


def flatten(state: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Split nested dicts and lists into their tensors and a JSON skeleton that refers to them."""
    if isinstance(state, torch.Tensor):
        return {prefix: state.detach().cpu().contiguous()}, {"tensor": prefix}
    if isinstance(state, dict):
        tensors: dict[str, torch.Tensor] = {}
        items = []
        for key, value in state.items():
            found, skeleton = flatten(value, f"{prefix}/{key}")
            tensors |= found
            items.append([key, skeleton])
        return tensors, {"dict": items}
    if isinstance(state, list | tuple):
        tensors, skeletons = {}, []
        for index, value in enumerate(state):
            found, skeleton = flatten(value, f"{prefix}/{index}")
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
    """Write ``checkpoint-STEP`` from a dict of state dicts; drop all but the newest `keep_last`."""
    final = run / f"checkpoint-{step}"
    temporary = run / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, part in state.items():
        tensors, skeleton = flatten(part)
        # One metadata key: safetensors writes several in a random order.
        save_file(tensors, temporary / f"{name}.safetensors", {"skeleton": json.dumps(skeleton)})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in checkpoints(run)[:-keep_last]:
        shutil.rmtree(old)
    return final


def load(checkpoint: Path) -> dict[str, Any]:
    """Read what `save` wrote."""
    from safetensors import safe_open

    state = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            skeleton = json.loads(opened.metadata()["skeleton"])
        state[file.stem] = unflatten(load_file(file), skeleton)
    return state


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def resolve(run: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: ``latest``, a folder name, or None for a fresh start.

    Raises:
        InputError: the named checkpoint is not there.
    """
    if wanted is None:
        return None
    found = checkpoints(run)
    if wanted == "latest":
        return found[-1] if found else None
    if run / wanted not in found:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"no checkpoint {wanted!r} in {run}; there are: {names}")
    return run / wanted
