"""``--verbose`` and ``--quiet``, which every command takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rectiflow.app.console import VERBOSE
from rectiflow.errors import InputError

OPTIONS = {
    "verbose": typer.Option(
        "--verbose", "-v", help="Also say what libraries warn of, and where a failure arose."
    ),
    "quiet": typer.Option(
        "--quiet", "-q", help="No progress, notes or warnings: the result and errors alone."
    ),
}


class Commands(typer.Typer):
    """A group whose commands, and itself before them, can be told how much to say."""

    def command(self, *names: Any, **given: Any) -> Callable[..., Any]:
        """As of typer."""
        return _telling(super().command(*names, **given))

    def callback(self, **given: Any) -> Callable[..., Any]:
        """As of typer."""
        return _telling(super().callback(**given))


def _telling(register: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        register(_told(command))
        return command

    return decorate


def _told(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def run(*, verbose: bool, quiet: bool, **given: Any) -> None:
        if verbose and quiet:
            raise InputError("--verbose and --quiet exclude each other: give one")
        if verbose:
            VERBOSE.set(True)
        if quiet:
            from rectiflow.progress import QUIET

            QUIET.set(True)
        command(**given)

    parameters = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(command, eval_str=True).parameters.values()
    ]
    parameters += [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, option],
        )
        for name, option in OPTIONS.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
