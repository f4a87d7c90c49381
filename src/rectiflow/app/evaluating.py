"""``rectiflow evaluate``: a command for each suite, and the first of them, ``emoji-models``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from rectiflow.app import coco, comparing, emoji_edits, options, pie_bench
from rectiflow.app.console import session
from rectiflow.app.loudness import Commands
from rectiflow.app.outputs import Outputs, Overwrite
from rectiflow.app.suites import Limit, Output, write_json
from rectiflow.errors import InputError
from rectiflow.files import replacing

if TYPE_CHECKING:
    from PIL import Image


class Suites(TyperGroup):
    """Commands that are listed where another one is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the first argument names.

        Raises:
            InputError: there is none.
        """
        if args[0] not in self.commands:
            raise InputError(f"no suite {args[0]!r}: give one of {', '.join(self.commands)}")
        return super().resolve_command(ctx, args)


commands = Commands(cls=Suites, subcommand_metavar="SUITE [ARGS]...", rich_markup_mode=None)
"""`rectiflow evaluate` itself, and its suites."""


@commands.callback(
    invoke_without_command=True,
    epilog="\b\nExample:\n  rectiflow evaluate emoji-edits --limit 24 --json\n"
    "  rectiflow evaluate emoji-edits --help",
)
def evaluate(context: typer.Context) -> None:
    """Measure models or methods on held-out scenes, PIE-Bench, COCO."""
    if context.invoked_subcommand is None:
        raise InputError("name a suite: rectiflow evaluate --help lists them")


@options.takes_model()
def emoji_models(
    *,
    limit: Limit = None,
    output: Output = None,
    overwrite: Overwrite = False,
    model: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Measure an embedded model, its codec and the CLIP."""
    with session(as_json) as terminal:
        of_default = model.model in (None, options.DEFAULT_MODEL)
        name = "emoji-models" if of_default else f"emoji-models-{Path(str(model.model)).name}"
        names = (f"{name}.json", f"{name}.png")
        outputs = None if output is None else Outputs(output, names, overwrite=overwrite)
        loaded = model.load()
        from rectiflow.evaluate.emoji_models import evaluate_emoji_models

        figures, sheet = evaluate_emoji_models(loaded, limit=limit)
        if outputs is not None:
            write_json(outputs.file(names[0]), figures)
            _save(sheet, outputs.file(names[1]))
            outputs.finish()
        judged = figures["judge"]
        terminal.result(
            figures,
            f"codec {figures['vae_psnr']:.2f} dB, CLIP top-1 {figures['clip_top1']:.1%}\n"
            f"of {figures['samples']} pictures: emoji {judged['emoji']:.1%}, background "
            f"{judged['background']:.1%}, count {judged['count']:.1%}",
        )


def _save(image: Image.Image, file: Path) -> None:
    with replacing(file) as unfinished:
        image.save(unfinished, format="PNG")


for suite, command, example in (
    ("emoji-models", emoji_models, "--model emoji-sd -o models"),
    ("emoji-edits", emoji_edits.emoji_edits, "--limit 24 --methods fast,ftedit -o edits"),
    ("pie-bench", pie_bench.pie_bench, "--data PIE-Bench_v1 --preset ftedit -o results"),
    ("coco", coco.coco, "--data coco --model emoji-sd --clip emoji-clip -o results"),
    ("inversion-error", comparing.inversion_error, "--steps 10 --steps 50 --limit 24 -o errors"),
    ("straight-edits", comparing.straight_edits, "-m emoji-sd -m emoji-2rf --steps 4 -o straight"),
):
    commands.command(suite, epilog=f"\b\nExample:\n  rectiflow evaluate {suite} {example}")(command)
