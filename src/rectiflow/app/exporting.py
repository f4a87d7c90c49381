"""``rectiflow export``: a run, or any model, as a folder for stock diffusers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options
from rectiflow.app.console import session
from rectiflow.app.options import Dtype
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.straighten.finished import Student


@options.takes_model(without=("model", "device", "dtype", "offload"))
def export(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="The folder of a run of reflow or distill; or an embedded model, a diffusers "
            "folder or a hub id.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the model.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Of the run: latest, or a name such as checkpoint-500.  [default: the finished "
            "model, else latest]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in the files.")] = Dtype.float16,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="A number of steps that the model is made for; repeatable.  [default: as trained]",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="At which it is to be used, for its rectiflow.json and card.  [default: 1 after "
            "reflow and for few steps]",
            show_default=False,
        ),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write the one-step model as ONNX, in onnx/.")
    ] = False,
    model: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Write a model as a folder for stock diffusers.

    Its record and card go with it. Of a run it is the averaged weights that are written; a model
    that was not trained here is written as it is, with the scheduler under which stock diffusers
    runs its exact velocity field.
    """
    with session(as_json) as terminal:
        import torch

        from rectiflow.straighten.export import ONNX, check_folder, save_pipeline
        from rectiflow.straighten.onnx import check_onnx, export_onnx

        started = time.perf_counter()
        options.check_finite("--guidance", guidance)
        check_folder(output)
        if onnx:
            check_onnx()
        student = _student(source, checkpoint, model)
        made_for = tuple(steps) if steps else student.student_steps
        if onnx:
            check_onnx(student.model)
        options.output_folder(output.parent)
        save_pipeline(
            student.model,
            output,
            dtype=getattr(torch, dtype.value),
            record=student.record,
            student_steps=made_for,
            guidance_scale=guidance,
        )
        files = export_onnx(student.model, output / ONNX) if onnx else []
        data: dict[str, Any] = {
            "source": source,
            "folder": str(output),
            "family": student.model.family,
            "step": student.step if "config" in student.record else None,
            "student_steps": sorted(set(made_for)),
            "dtype": dtype.value,
            "megabytes": round(_size(output) / 1e6, 3),
            "onnx": [str(file.relative_to(output)) for file in files],
            "seconds": time.perf_counter() - started,
            "warnings": terminal.warnings,
        }
        words = f"{output}: {data['megabytes']:.1f} MB, {dtype.value}; README.md says how to run it"
        terminal.result(data, words)


def _student(source: str, checkpoint: str | None, chosen: options.ModelOptions) -> Student:
    """What a run made; or a model, as a student of nobody."""
    from rectiflow.models.folder import INDEX
    from rectiflow.straighten.finished import Student, find_run, load_student
    from rectiflow.straighten.training_record import read_record

    folder = Path(source).expanduser()
    is_model = (folder / INDEX).is_file()
    run = find_run(folder) if folder.is_dir() and not is_model else None
    if run is not None:
        for name in chosen.weights:
            raise InputError(f"--{name} is for models: the run {run} says itself what it began as")
        return load_student(run, checkpoint)
    if checkpoint is not None:
        raise InputError(f"--checkpoint is for runs, and {source} is none")
    if folder.is_dir() and not is_model:
        raise InputError(f"{folder} is no run (no config.yaml) and no model (no {INDEX})")
    model = chosen.load(source, device="cpu")
    record = (read_record(folder) if folder.is_dir() else None) or {}
    return Student(model, record, model.metadata.student_steps or (), 0)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
