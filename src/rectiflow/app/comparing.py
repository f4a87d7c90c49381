"""``rectiflow evaluate inversion-error`` and ``straight-edits``: their options."""

from __future__ import annotations

from typing import Annotated

import typer

from rectiflow.app import inversion_error as suites
from rectiflow.app import options
from rectiflow.app.console import session
from rectiflow.app.outputs import Overwrite
from rectiflow.app.suites import BatchSize, Limit, Output, StepCounts, methods_in

MODELS = (
    "An embedded model, a diffusers folder or a hub id; repeatable, a teacher before what was "
    "straightened from it."
)


@options.takes_model(None, help=MODELS, several=True)
def inversion_error(
    *,
    model: options.ModelOptions,
    steps: StepCounts = None,
    reference_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Of the accurate solution.  [default: 100]", show_default=False),
    ] = None,
    limit: Limit = None,
    output: Output = None,
    overwrite: Overwrite = False,
    batch_size: BatchSize = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the error of inversion steps, flow or diffusion.

    How far the velocity that a step of Euler's or DDIM's inversion knows is from the one it looks
    for, and where the round trip ends: of emoji-sd and emoji-sd3, in 10, 25 and 50 steps, on 8
    held-out scenes, unless the options say otherwise.
    """
    with session(as_json) as terminal:
        suites.inversion_error(
            terminal,
            model=model,
            output=output,
            overwrite=overwrite,
            limit=limit,
            steps=steps,
            reference_steps=reference_steps,
            batch_size=batch_size,
        )


@options.takes_model(None, help=MODELS, several=True)
def straight_edits(
    *,
    model: options.ModelOptions,
    steps: StepCounts = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Some of euler, ddim, query-offset and flowedit. By default all.",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, help="Of the target prompt.  [default: 1.5]", show_default=False),
    ] = None,
    limit: Limit = None,
    output: Output = None,
    overwrite: Overwrite = False,
    batch_size: BatchSize = None,
    as_json: options.AsJson = False,
) -> None:
    """Edit with a straightened flow and with its teacher.

    48 held-out edits by emoji-sd and by emoji-2rf, in 2, 4, 8, 15 and 25 steps, unless the options
    say otherwise: how near they come to the true targets, and the round trips to the pictures.
    What an output folder has is not made again.
    """
    with session(as_json, resumable=output is not None) as terminal:
        suites.straight_editing(
            terminal,
            model=model,
            output=output,
            overwrite=overwrite,
            limit=limit,
            steps=steps,
            methods=methods_in(methods),
            guidance_scale=guidance,
            batch_size=batch_size,
        )
