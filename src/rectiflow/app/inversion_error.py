"""``rectiflow evaluate inversion-error`` and ``straight-edits``: what they write and print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.app import options
from rectiflow.app.console import Session
from rectiflow.app.outputs import Outputs
from rectiflow.app.suites import write_json
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rectiflow.models.base import FlowModel

ERROR_MODELS = ("emoji-sd", "emoji-sd3")
"""A diffusion model, and a rectified flow of the same world."""
EDITING_MODELS = ("emoji-sd", "emoji-2rf")
"""A teacher, and what was straightened from it."""


def inversion_error(
    terminal: Session,
    *,
    model: options.ModelOptions,
    output: Path | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    steps: Sequence[int] | None = None,
    reference_steps: int | None = None,
    batch_size: int | None = None,
) -> None:
    """How wrong an inversion step is, in either coordinates; several models, on the same scenes."""
    outputs = _outputs(output, "inversion-error", overwrite)
    # The one step of a way of one step leads to the end, where a diffusion model has no velocity.
    loaded = _loaded(model, ERROR_MODELS, steps, at_least=2)
    from rectiflow.evaluate.inversion_error import (
        BATCH,
        LIMIT,
        REFERENCE_STEPS,
        STEPS,
        evaluate_inversion_error,
    )
    from rectiflow.evaluate.inversion_plots import error_plots

    figures = evaluate_inversion_error(
        loaded,
        steps=steps or STEPS,
        limit=LIMIT if limit is None else limit,
        reference_steps=reference_steps or REFERENCE_STEPS,
        batch_size=batch_size or BATCH,
    )
    if outputs is not None:
        write_json(outputs.file("inversion-error.json"), figures)
        _save(error_plots(figures), outputs, "inversion-error")
    terminal.result(figures, error_text(figures))


def straight_editing(
    terminal: Session,
    *,
    model: options.ModelOptions,
    output: Path | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    steps: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
) -> None:
    """Edits by a teacher and what was straightened from it; an output folder is taken up again."""
    outputs = _outputs(output, "straight-edits", overwrite)
    loaded = _loaded(model, EDITING_MODELS, steps)
    from rectiflow.evaluate.emoji_edits import BATCH
    from rectiflow.evaluate.inversion_plots import straight_plots
    from rectiflow.evaluate.straight_editing import (
        GUIDANCE,
        LIMIT,
        METHODS,
        STEPS,
        evaluate_straight_editing,
    )

    figures = evaluate_straight_editing(
        loaded,
        steps=steps or STEPS,
        methods=methods or tuple(METHODS),
        guidance_scale=GUIDANCE if guidance_scale is None else guidance_scale,
        limit=LIMIT if limit is None else limit,
        batch_size=batch_size or BATCH,
        folder=None if output is None else output / "parts",
    )
    if outputs is not None:
        write_json(outputs.file("straight-edits.json"), figures)
        _save(straight_plots(figures), outputs, "straight-edits")
    terminal.result(figures, editing_text(figures))


def _loaded(
    model: options.ModelOptions,
    default: Sequence[str],
    steps: Sequence[int] | None,
    at_least: int = 1,
) -> list[FlowModel]:
    """The models, once everything else about the command is known to be right."""
    models = model.models or default
    if len(set(models)) < len(models):
        raise InputError(f"--model is given as {', '.join(models)}: give each once")
    for count in steps or ():
        if count < at_least:
            raise InputError(f"steps has {count}: give {at_least} or more")
    return [model.load(name) for name in models]


def _outputs(output: Path | None, name: str, overwrite: bool) -> Outputs | None:
    if output is None:
        return None
    return Outputs(output, [f"{name}.json", f"{name}-*.svg"], overwrite=overwrite)


def _save(plots: Mapping[str, Figure], outputs: Outputs, prefix: str) -> None:
    from rectiflow.report.figures import save_figure

    for name, figure in plots.items():
        save_figure(figure, outputs.file(f"{prefix}-{name}.svg"))
    outputs.finish()


def error_text(figures: Mapping[str, Any]) -> str:
    """The table as it is printed, and what follows from it."""
    lines = [
        f"{figures['n']} held-out scenes; error of a step relative to what it moves, the network "
        "told the noisier time (and the state's own), and of the round trip"
    ]
    width = max(len(name) for name in figures["models"])
    for name, entry in figures["models"].items():
        for count, found in entry["steps"].items():
            errors, trips = found["errors"], found["round_trip"]
            parts = [
                f"{coordinates} {errors[f'{coordinates}, noisier']['mean']:6.1%} "
                f"({errors[f'{coordinates}, cleaner']['mean']:6.1%})"
                for coordinates in ("straight", "diffusion")
            ]
            parts += [
                f"{scheme} {trips[f'{scheme}, noisier']['mean']:6.1%} "
                f"({trips[f'{scheme}, cleaner']['mean']:6.1%})"
                for scheme in ("euler", "ddim")
            ]
            lines.append(f"  {name:{width}} {count:>3} steps: {', '.join(parts)}")
    return "\n".join([*lines, *figures["sentences"]])


def editing_text(figures: Mapping[str, Any]) -> str:
    """The table as it is printed, and what follows from it."""
    nothing, bound = (figures["references"][name]["mean"] for name in ("nothing", "bound"))
    lines = [
        f"{figures['n']} edits, guidance {figures['guidance_scale']}; PSNR to the true target "
        f"(doing nothing {nothing:.2f} dB, bound {bound:.2f} dB), squared error inside and outside "
        "the edit, PSNR of the round trip, network samples"
    ]
    for name, entry in figures["models"].items():
        s = entry["straightness"]
        lines.append(f"{name}: S(Z) {s['mean']:.4g} ({s['low']:.4g} to {s['high']:.4g})")
        for count, methods in entry["steps"].items():
            for method, found in methods.items():
                trip = found.get("reconstruction_psnr")
                lines.append(
                    f"  {count:>3} steps, {method:12} {found['target_psnr']['mean']:6.2f} dB "
                    f"{found['inside_mse']['mean']:.4f} {_or_dash(found.get('outside_mse'), 4)} "
                    f"{_or_dash(trip, 2)} {found['nfe']['mean']:5.0f}"
                )
    return "\n".join([*lines, *figures["sentences"]])


def _or_dash(found: Mapping[str, float] | None, digits: int) -> str:
    return f"{'-':>6}" if found is None else f"{found['mean']:6.{digits}f}"
