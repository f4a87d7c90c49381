"""The command ``rectiflow``: its subcommands, and what their failures look like outside."""

from __future__ import annotations

import contextvars
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from rectiflow._version import __version__
from rectiflow.app import (
    chain,
    citing,
    demo,
    editing,
    evaluating,
    exporting,
    generating,
    inventory,
    inverting,
    pairs_inspect,
    provenance,
    reproducing,
    straightening,
    training,
)
from rectiflow.app.console import TYPED, as_typed, fail, one_line
from rectiflow.app.loudness import Commands
from rectiflow.errors import InputError, WorkError

app = Commands(
    name="rectiflow",
    help="Invert and edit images with pretrained flow models, and straighten those.",
    rich_markup_mode=None,  # rich costs a fifth of a second on every --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with:  rectiflow demo -o demo",
)
for command, example in (
    (demo.demo, "rectiflow demo -o demo"),
    (
        editing.edit,
        'rectiflow edit photo.png --from "a red apple on a white background" '
        '--to "a lemon on a white background" -o out',
    ),
    (
        chain.chain,
        'rectiflow chain photo.png --from "a red apple" --to "a green apple" '
        '--to "a green apple on a beach" -o out',
    ),
    (generating.generate, 'rectiflow generate "two cats on a beach" --seed 3 -n 4 -o out'),
    (
        inverting.invert,
        'rectiflow invert photo.png --prompt "a red apple" -o apple.safetensors',
    ),
    (
        straightening.reflow,
        "rectiflow reflow --pairs pairs --config toy -o runs/reflow --export 2rf",
    ),
    (
        straightening.distill,
        "rectiflow distill --model 2rf --pairs pairs-2 --config toy -o runs/distill",
    ),
    (exporting.export, "rectiflow export runs/distill -o one-step"),
    (training.train, "rectiflow train emoji-vae --set batch_size=16 -o runs/vae --max-minutes 30"),
    (reproducing.reproduce, "rectiflow reproduce instaflow --size small --processes 2"),
    (inventory.models, "rectiflow models"),
    (inventory.doctor, "rectiflow doctor"),
    (provenance.info, "rectiflow info out/edit-1.png"),
    (provenance.replay, "rectiflow replay out/edit-1.png -o again.png"),
    (citing.cite, "rectiflow cite ftedit"),
):
    # \b keeps the lines as they are.
    app.command(epilog=f"\b\nExample:\n  {example}")(command)
app.add_typer(pairs_inspect.commands, name="pairs")
app.add_typer(evaluating.commands, name="evaluate")

NO_MEMORY = "not enough memory: use a smaller image or model, or --dtype bfloat16"

# typer's own usage errors; where they are defined differs by version, their public child does not.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
) -> None:
    """Invert and edit images with pretrained flow models, and straighten those."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own by default) and return its exit code.

    0: done; 1: the work failed; 2: the input or the usage is wrong; 75: stopped, and the same
    command goes on later; 130: interrupted. Failures are one line on stderr.
    """
    # In a context of its own: what one call is told of how much to say ends with it.
    return contextvars.copy_context().run(_main, sys.argv[1:] if argv is None else list(argv))


def _main(arguments: list[str]) -> int:
    TYPED.set(arguments)
    # What these libraries have to say at import is about themselves, not about the user's work.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for number, argument in enumerate(arguments, 1):
        if re.search("[\ud800-\udfff]", argument):  # Python's way of keeping bytes
            return fail(f"argument {number}, {argument!r}, is not text in UTF-8", 2)
    try:
        code = app(args=arguments, prog_name="rectiflow", standalone_mode=False, obj=arguments)
    except InputError as error:
        return fail(as_typed(str(error)), 2)
    except UsageError as error:
        return fail(f"{_usage(error)}; see {_help_of(error)}", 2)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", 130)
    except WorkError as error:
        return fail(str(error), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}", 1)
    except MemoryError:
        return fail(NO_MEMORY, 1)
    except RuntimeError as error:
        # Of PyTorch: torch.OutOfMemoryError on accelerators, a bare RuntimeError on the CPU.
        if not re.search("out of memory|can't allocate memory", str(error), re.IGNORECASE):
            raise
        return fail(NO_MEMORY, 1)
    if code == 130:  # newer versions of typer turn an interrupt into this
        return fail("interrupted", 130)
    return code if isinstance(code, int) else 0


def _usage(error: Exception) -> str:
    message = one_line(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    message = message.replace("Value error, ", "")  # pydantic's word, inside typer's
    return message[:1].lower() + message[1:]


def _help_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'rectiflow'} --help"
