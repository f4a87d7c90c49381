"""The terminal: results alone on stdout; warnings, progress and errors on stderr, a line each."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

import rectiflow
from rectiflow.stopping import GO_ON_LATER, Stopped, at_once

if TYPE_CHECKING:
    pass

PACKAGE = str(Path(rectiflow.__file__).parent)
VERBOSE = ContextVar("verbose", default=False)
"""Whether libraries' warnings and tracebacks are shown, in this context (`--verbose`)."""


TYPED: ContextVar[Sequence[str]] = ContextVar("typed", default=())
"""The words of the command line, in this context."""
PYTHON_NAMES = {
    "--steps": "num_inference_steps",
    "--guidance": "guidance_scale",
    "--from": "source_prompt",
    "--prompt": "source_prompt",
    "--negative": "negative_prompt",
}
"""What options are called in Python that are not called the same there."""


def as_typed(text: str) -> str:
    """A message in which arguments and settings have the names under which they were typed.

    Example:
        >>> TYPED.set(["edit", "--steps", "0", "--set", "n_avg=0"]) and None
        >>> as_typed("num_inference_steps is 0; at least 1"), as_typed("n_avg is 0; at least 1")
        ('--steps is 0; at least 1', '--set n_avg is 0; at least 1')
    """
    words = TYPED.get()
    names: dict[str, str] = {}
    for before, word in pairwise(["", *words]):
        option = word.partition("=")[0]
        if before == "--set":
            names.setdefault(option, f"--set {option}")
        elif option.startswith("--"):
            names[PYTHON_NAMES.get(option, option[2:].replace("-", "_"))] = option
    for name, typed in names.items():
        word = rf"(?<![\w-]){re.escape(name)}(?![\w=-])"
        if "_" not in name:  # an ordinary word, unless it is where a name is
            word = rf"(?:^|(?<=leave )|(?<=: )){re.escape(name)}(?= is | out|: )"
        text = re.sub(word, typed.replace("\\", r"\\"), text)
    return text


_HIDDEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What moves a terminal's cursor, repaints it, or turns the direction of what follows; a line break
is not in it."""


def visible(text: str) -> str:
    """A text as a terminal may show it: control characters, from a file say, as their codes.

    Example:
        >>> print(visible("red \x1b[31mapple"))
        red \\x1b[31mapple
    """
    return _HIDDEN.sub(lambda found: repr(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """A text with its line breaks and indentation made spaces, and nothing hidden in it."""
    return visible(" ".join(text.split()))


def command_line(context: typer.Context) -> str:
    """The command as it was typed, to be shown in a report."""
    return shlex.join(["rectiflow", *context.find_root().obj])


def fail(text: str, code: int) -> int:
    """Print the error that is being handled, if any, and return the exit code."""
    if VERBOSE.get():
        traceback.print_exc()
    print(f"rectiflow: error: {one_line(text)}", file=sys.stderr)
    return code


def _bare(text: str) -> str:
    """A text whatever its first letter's case and its last dot."""
    return text.rstrip(".").casefold()


class Session:
    """What a command says while it runs, and its result."""

    def __init__(self, stdout: TextIO, as_json: bool) -> None:
        self.stdout = stdout
        self.as_json = as_json
        self.warnings: list[str] = []
        self.noted: set[str] = set()

    def warn(self, text: str) -> None:
        """Print a warning, the same one only once."""
        from tqdm import tqdm

        from rectiflow.progress import QUIET

        if any(_bare(text) == _bare(known) for known in self.warnings):
            return
        self.warnings.append(text)
        if not QUIET.get():
            tqdm.write(f"rectiflow: warning: {one_line(as_typed(text))}", file=sys.stderr)

    def note(self, text: str, once: str | None = None) -> None:
        """Say something that is no warning; `once` names what is said only once in a session."""
        from tqdm import tqdm

        from rectiflow.progress import QUIET

        if once in self.noted or QUIET.get():
            return
        self.noted |= {once} if once else set()
        tqdm.write(f"rectiflow: {one_line(text)}", file=sys.stderr)

    def result(self, data: dict[str, Any], summary: str) -> None:
        """Print the result: as JSON if that was asked for, else in words."""
        text = json_text(data) if self.as_json else visible(summary)
        print(text, file=self.stdout, flush=True)


@contextmanager
def session(as_json: bool, resumable: bool = False) -> Iterator[Session]:
    """Keep stdout for the result, and show of all warnings only our own.

    Args:
        as_json: how the result is printed.
        resumable: whether the same command goes on where it was stopped; a signal then ends it
            with a code that says so.
    """
    opened = Session(sys.stdout, as_json)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and filename.startswith(PACKAGE):
            opened.warn(str(message))
        elif VERBOSE.get():
            opened.note(warnings.formatwarning(message, category, filename, lineno, line))

    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        if VERBOSE.get():
            warnings.simplefilter("default")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        try:
            with at_once() if resumable else nullcontext():
                yield opened
        except Stopped as signal:
            opened.note(f"stopped by {signal}: the same command goes on from what is there")
            raise typer.Exit(GO_ON_LATER) from None


def json_text(data: Any) -> str:
    """Data as JSON; numbers that JSON cannot write, such as the PSNR of equal pictures, are null.

    Example:
        >>> print(json_text({"psnr": math.inf}))
        {
          "psnr": null
        }
    """
    text = json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False)
    # Those below U+0020 are escaped already, and outside of texts there are none.
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def finite(data: Any) -> Any:
    """Nested data with None for every number that is not finite, and paths as text."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return str(data) if isinstance(data, Path) else data
