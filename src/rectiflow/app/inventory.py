"""``rectiflow models`` and ``doctor``: what is there, and what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import platform
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rectiflow.app import options
from rectiflow.app.console import Session, one_line, session
from rectiflow.errors import InputError

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "PIL", "typer")
LEAST_FREE_GB = 1.0


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            help="An embedded model, or a folder: what it is made for, and its words.",
            show_default=False,
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List models, families and presets; or tell of one model."""
    with session(as_json) as terminal:
        if name is not None:
            _one_model(name, terminal)
            return
        from rectiflow.invert.presets import DEFAULT_PRESET, PRESETS
        from rectiflow.models.load import FAMILIES, WEIGHTS, embedded_models
        from rectiflow.models.metadata import FILE_NAME, read_metadata

        embedded = [
            {
                "name": name,
                "folder": str(WEIGHTS / name),
                "megabytes": round(_size(WEIGHTS / name) / 1e6, 1),
                **read_metadata(WEIGHTS / name / FILE_NAME).model_dump(),
            }
            for name in embedded_models()
        ]
        data = {
            "models": embedded,
            "families": {pipeline: kind.family for pipeline, kind in FAMILIES.items()},
            "presets": {name: dataclasses.asdict(preset) for name, preset in PRESETS.items()},
        }
        lines = ["Embedded models (--model):"]
        lines += [
            f"  {model['name']:12} {model['megabytes']:6.1f} MB  family {model['family']}, "
            f"{model['default_num_inference_steps']} steps at guidance "
            f"{model['default_guidance_scale']}"
            for model in embedded
        ] or ["  none"]
        lines += ["Any folder or hub id of these diffusers pipelines:"]
        lines += [f"  {pipeline}" for pipeline in FAMILIES]
        lines += [f"Presets (--preset; an edit takes {DEFAULT_PRESET} if none is named):"]
        width = max(map(len, PRESETS))
        lines += [f"  {name:{width}} {preset.reference}" for name, preset in PRESETS.items()]
        terminal.result(data, "\n".join(lines))


def _one_model(name: str, terminal: Session) -> None:
    from rectiflow.models.load import saved

    told = saved(name)
    metadata = told.metadata()
    words = sorted((metadata.vocabulary or "").split())
    data = {"name": name, "pipeline": told.class_name, "verified": told.verified}
    data |= metadata.model_dump()
    lines = [f"{name}: a {told.class_name}"]
    what = "are what was written" if told.verified else "have no checksums, and are unverified"
    lines.append(f"its files {what}")
    lines += [f"knows: {metadata.knows}"] if metadata.knows else []
    if metadata.default_num_inference_steps:
        lines.append(
            f"made for {metadata.default_num_inference_steps} steps at guidance "
            f"{metadata.default_guidance_scale:g}"
        )
    if words:
        text = textwrap.fill(" ".join(words), 98, initial_indent="  ", subsequent_indent="  ")
        lines += [f"the {len(words)} words it knows:", text]
    terminal.result(data, "\n".join(lines))


def doctor(as_json: options.AsJson = False) -> None:
    """Check Python, libraries, devices, embedded weights and disk.

    The exit code is 1 if something is broken; each finding comes with its remedy.
    """
    checks: dict[str, Callable[[], str]] = {"python": _python}
    checks |= {name: functools.partial(_library, name) for name in LIBRARIES}
    checks |= {
        "torchvision": _torchvision,
        "devices": _devices,
        "weights": _weights,
        "disk": _disk,
    }
    with session(as_json) as terminal:
        found: list[dict[str, Any]] = []
        for name, check in checks.items():
            # Whatever is broken here is what the command is to say.
            try:
                found.append({"check": name, "ok": True, "detail": check()})
            except Exception as error:
                detail = one_line(str(error)) or type(error).__name__
                found.append({"check": name, "ok": False, "detail": detail})
        broken = [entry["check"] for entry in found if not entry["ok"]]
        lines = [
            f"{'ok ' if entry['ok'] else 'BAD'} {entry['check']:13} {entry['detail']}"
            for entry in found
        ]
        lines.append(f"broken: {', '.join(broken)}" if broken else "everything works")
        terminal.result({"ok": not broken, "checks": found}, "\n".join(lines))
    if broken:
        raise typer.Exit(1)


def _python() -> str:
    return f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"


def _library(name: str) -> str:
    return str(importlib.import_module(name).__version__)


def _torchvision() -> str:
    """Not needed; but one that does not fit its PyTorch breaks transformers."""
    try:
        found = _library("torchvision")
    except ModuleNotFoundError:
        return "not installed, and not needed"
    except Exception as error:
        raise InputError(
            f"installed but broken ({error}): it is not needed, uninstall it"
        ) from error
    return f"{found}, not needed"


def _devices() -> str:
    import torch

    for_cpu = f"cpu with {torch.get_num_threads()} threads, in float32 (--dtype says otherwise)"
    if not torch.accelerator.is_available():
        return for_cpu
    kind = torch.accelerator.current_accelerator()
    torch.ones(1, device=kind).sum().item()
    return (
        f"{torch.accelerator.device_count()} × {kind}, which computes in what a checkpoint is "
        f"stored in; {for_cpu}"
    )


def _weights() -> str:
    """Every embedded model loads, which includes that its weights are finite."""
    from rectiflow.models.load import embedded_models, load

    names = embedded_models()
    if options.DEFAULT_MODEL not in names:
        raise InputError(f"{options.DEFAULT_MODEL} is missing: install rectiflow again")
    loaded = [load(name, device="cpu") for name in names]
    return ", ".join(f"{model.name} ({model.weight_hash[:12]})" for model in loaded)


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    if free < LEAST_FREE_GB:
        raise InputError(f"{free:.2f} GB free in {Path.cwd()}: make room")
    return f"{free:.1f} GB free here"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
