"""What comes out: a plain diffusers folder, that needs nothing of ours to be loaded and run.

The network is stored with diffusers' sign and time, the scheduler is the one under which the stock
pipeline goes the student's own steps (`stock`), and beside diffusers' files lie `rectiflow.json`
(how the model is meant to be used), `training.json` (where it comes from) and the model card.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rectiflow._version import __version__
from rectiflow.checksums import CHECKSUMS, write_checksums
from rectiflow.errors import InputError, WorkError
from rectiflow.files import final_name, readable_alike, unfinished_folder
from rectiflow.guarded import read_json
from rectiflow.models.base import FlowModel
from rectiflow.models.folder import INDEX, Folder, load_in_float32
from rectiflow.models.guidance import check_guidance
from rectiflow.models.hub import first_sentence
from rectiflow.models.libraries import quiet_libraries
from rectiflow.models.load import FAMILIES
from rectiflow.models.lora import merge_loras
from rectiflow.models.metadata import FILE_NAME, Metadata, write_metadata
from rectiflow.straighten.card import CARD, made_for_few_steps, write_card
from rectiflow.straighten.stock import stock_scheduler
from rectiflow.straighten.training_record import FILE_NAME as RECORD
from rectiflow.straighten.training_record import read_record, write_record

ONNX = "onnx"
"""The folder of the ONNX files in a model's folder."""

PATHS = ("_name_or_path", "name_or_path")
"""Where libraries note in their files from which place on this machine a part was loaded."""

NAME = r"[\w-][\w.-]*(/[\w.-]+)?"
"""An embedded model, or one of the hub; a path on this machine tells nobody else anything."""

REFLOWED_GUIDANCE, REFLOWED_STEPS = 1.0, 25
"""For a reflowed flow that was not distilled: the guidance is in its pairs (docs/choosing.md)."""


def save_pipeline(
    model: FlowModel,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    record: Mapping[str, Any] | None = None,
    student_steps: Sequence[int] = (),
    guidance_scale: float | None = None,
) -> None:
    """Write a model as a folder that `diffusers.DiffusionPipeline.from_pretrained` loads.

    It is written under another name, loaded from there and compared, and renamed: the folder is
    there whole or not at all. LoRAs are merged into the weights. A folder that this function wrote
    before is replaced; the model itself is left as it is.

    Args:
        model: A student, or any model.
        folder: New, empty, or an earlier export.
        dtype: Of all weights in the files.
        record: Where the model comes from; as `StraightenTask.export` puts it together. What the
            model itself carries if None.
        student_steps: The numbers of steps that it was made for; none for a model that was not
            trained for few.
        guidance_scale: At which it is to be used, if that is known better than by the rule: 1
            (none) after reflow and for students of few steps. InstaFlow takes 1.5 after reflow,
            which measures worse here (docs/choosing.md).

    Raises:
        InputError: The folder has other things in it, a weight does not fit into the dtype, or the
            guidance is negative.
        WorkError: The files could not be written, or are not what was written.
    """
    if guidance_scale is not None:
        check_guidance("guidance_scale", guidance_scale)
    put_back(folder)
    check_folder(folder)
    record = completed(record or model.record or {}, model)
    temporary = None
    with quiet_libraries():
        pipeline = _stock_pipeline(model, dtype)
        try:
            temporary = unfinished_folder(folder)
            pipeline.save_pretrained(temporary)
            load_in_float32(temporary)
            forget_paths(temporary)
            metadata = metadata_of(model, record, student_steps)
            if guidance_scale is not None:
                metadata = metadata.model_copy(update={"default_guidance_scale": guidance_scale})
            write_metadata(metadata, temporary)
            write_record(record, temporary)
            shown = type(model)(pipeline, name=folder.name, metadata=metadata)
            write_card(shown, record, temporary, name=final_name(folder) or "model", dtype=dtype)
            write_checksums(temporary)
            readable_alike(temporary)
            _check(temporary, pipeline, dtype)
            put_in_place(temporary, folder)
        except (OSError, SafetensorError) as error:
            raise WorkError(
                f"cannot write {folder} ({_why(error)}): what was there is untouched; make room on "
                "the disk and give the same command again"
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def _why(error: Exception) -> str:
    """What went wrong with a file, in the system's words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_sentence(error).rpartition(": ")[2].partition(" (os error")[0]


def check_folder(folder: Path) -> None:
    """See that a folder is new, empty, or an earlier export with nothing else in it.

    Raises:
        InputError: It has other things in it, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a new folder")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not there:
        return
    ours = {INDEX, FILE_NAME, RECORD}
    if ours <= there:
        index = read_json(folder / INDEX)
        there -= {*index, *ours, CARD, ONNX, CHECKSUMS}
        if not there:
            return
    raise InputError(
        f"{folder} has other things in it ({sorted(there)[0]}): name a new folder, or empty it"
    )


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a finished folder; an earlier one goes when the new one is there."""
    aside = _aside(folder)
    if folder.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    os.replace(temporary, folder)
    shutil.rmtree(aside, ignore_errors=True)


def put_back(folder: Path) -> None:
    """An earlier export that a kill left aside, before the new one had come, is itself again."""
    aside = _aside(folder)
    if aside.is_dir() and not aside.is_symlink() and not folder.exists():
        os.replace(aside, folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def completed(record: Mapping[str, Any], model: FlowModel) -> dict[str, Any]:
    """A record with the versions it was made by, and what is recorded of the model before it."""
    libraries = ("torch", "diffusers", "transformers")
    full: dict[str, Any] = {
        "versions": {"rectiflow": __version__} | {name: version(name) for name in libraries},
        **record,
    }
    origin = full.get("began_as", {}).get("model", model.name)
    place = Path(str(origin)).expanduser()
    before = full.get("before") or (read_record(place) if place.is_dir() else None)
    if "began_as" in full and before is not None:
        full["before"] = before
    named = (before or {}).get("base_model")
    if not place.is_dir() and origin != "unnamed" and re.fullmatch(NAME, str(origin)):
        named = str(origin)
    if named is not None:
        full.setdefault("base_model", named)
    return full


def metadata_of(
    model: FlowModel, record: Mapping[str, Any], student_steps: Sequence[int]
) -> Metadata:
    """What `rectiflow.json` says: the teacher's word, but where training has changed it."""
    changed: dict[str, Any] = {"family": model.family}
    config = record.get("config", {})
    if student_steps or config:
        changed["domain"] = None  # which was measured of other weights
        changed["student_steps"] = tuple(sorted(set(student_steps))) or None
    if student_steps and made_for_few_steps(config):
        changed["default_num_inference_steps"] = min(student_steps)
        scales = config.get("guidance_scales") or [1.0]
        changed["default_guidance_scale"] = float(scales[0]) if model.guidance_embeds else 1.0
    elif config.get("kind") == "reflow":
        changed["default_num_inference_steps"] = REFLOWED_STEPS
        changed["default_guidance_scale"] = REFLOWED_GUIDANCE
    return model.metadata.model_copy(update=changed)


def forget_paths(folder: Path) -> None:
    """Take out of a folder's files where on this machine its parts came from."""
    for file in folder.rglob("*.json"):
        if "config" not in file.name and file.name != INDEX:
            continue
        said = read_json(file)
        kept = {key: value for key, value in said.items() if key not in PATHS}
        if kept != said:
            text = json.dumps(kept, indent=2, ensure_ascii=False)
            file.write_text(text + "\n", encoding="utf-8")


def _stock_pipeline(model: FlowModel, dtype: torch.dtype) -> Any:
    """The model's pipeline around parts in the dtype of the files and the stock scheduler."""
    kind, pipeline = type(model.pipeline), model.pipeline
    parts = dict(pipeline.components)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            parts[name] = _in_dtype(name, part, dtype)
    parts["scheduler"] = stock_scheduler(model)
    known = inspect.signature(kind.__init__).parameters
    said = {key: v for key, v in pipeline.config.items() if key in known and key not in parts}
    return kind(**parts, **said)


def _in_dtype(name: str, part: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A network in another dtype, its LoRAs merged; itself if nothing is to be done."""
    if any(weight.is_meta for weight in part.state_dict().values()):
        raise InputError(f"{name} is offloaded: load the model without offload to export it")
    with_lora = bool(getattr(part, "peft_config", None))
    weights = [weight for weight in part.state_dict().values() if weight.is_floating_point()]
    if not with_lora and all(weight.dtype == dtype for weight in weights):
        return part
    part = copy.deepcopy(part)
    if with_lora:
        merge_loras(part)
    part = part.to(dtype)
    for key, weight in part.state_dict().items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise InputError(
                f"{name}.{key} has values that {str(dtype).removeprefix('torch.')} cannot hold: "
                "export in bfloat16 or float32"
            )
    return part


def _check(folder: Path, pipeline: Any, dtype: torch.dtype) -> None:
    """See that what is read from a folder is what was to be written, to the last bit."""
    loaded = Folder(folder, folder.name, FAMILIES).pipeline(dtype)
    for name, part in pipeline.components.items():
        read = getattr(loaded, name)
        if not isinstance(part, nn.Module) or read is None:  # a safety checker is not loaded
            continue
        written, found = part.state_dict(), read.state_dict()
        for key, weight in written.items():
            if key not in found or not torch.equal(weight.cpu(), found[key].to(weight.dtype)):
                raise WorkError(f"{folder}: {name}.{key} is not what was written: try again")
