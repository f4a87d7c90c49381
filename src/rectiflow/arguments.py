"""Arguments of public functions: one of a wrong type is refused in one line, before it is used."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rectiflow.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

LARGEST_SEED = 2**63 - 1
"""Of PyTorch's generators."""
NUMBERS = {int: numbers.Integral, float: numbers.Real}
"""What stands for a number: NumPy's, too."""
NAMES = {
    "NoneType": "None",
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "Path": "a path",
    "PathLike": "a path",
    "Image": "a Pillow image",
    "ndarray": "an array",
    "Tensor": "a tensor",
    "FlowModel": "a model from rectiflow.load",
    "UNetModel": "a model from rectiflow.load that has a U-Net",
    "dtype": "a dtype of torch",
    "Callable": "a function",
    "Reportable": "what rectiflow.edit returned",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments whose annotation does not allow them.

    Raises:
        InputError: in the function's place; names the argument, what it is and what to give.
    """
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **given: P.kwargs) -> R:
        hints = _hints(function)
        # What is missing or too much is Python's to say.
        for name, value in {**dict(zip(names, args, strict=False)), **given}.items():
            if name in hints:
                check_type(name, value, hints[name])
        return function(*args, **given)

    return call


def check_type(name: str, value: object, hint: Any) -> None:
    """Refuse a value that is not of a type.

    Args:
        name: what to call it.
        value: of anything.
        hint: a type annotation.

    Raises:
        InputError: one line.

    Example:
        >>> check_type("steps", "4", int | None)
        Traceback (most recent call last):
        rectiflow.errors.InputError: steps is '4': give a whole number or None
    """
    if _fits(value, hint):
        return
    wanted = _description(hint)
    if isinstance(value, str) and "a model from" in wanted:
        raise InputError(f"{name} is a name, {value!r}: load it first, rectiflow.load({value!r})")
    shown = " ".join(repr(value).split())
    if shown.startswith("<"):
        shown = _description(type(value))
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise InputError(f"{name} is {shown}: give {wanted}")


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's parameters, but of ``**settings``, that can be resolved."""
    found, known = {}, inspect.unwrap(function).__globals__
    for name, one in inspect.signature(function).parameters.items():
        if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL) or one.annotation is one.empty:
            continue
        try:
            found[name] = eval(str(one.annotation), known)
        except NameError:  # imported for type checkers alone
            continue
    return found


def _fits(value: object, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return True
    if isinstance(hint, TypeVar):
        return hint.__bound__ is None or _fits(value, hint.__bound__)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:  # which of them it is, is better said where they are known
        return isinstance(value, str)
    if hint is None or hint is types.NoneType:
        return value is None
    kind = origin or hint
    if kind in (list, tuple, Sequence):
        if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping | set):
            return False
        return not parts or all(_fits(one, parts[0]) for one in value)
    if kind is Mapping and parts and isinstance(value, Mapping):
        return all(_fits(key, parts[0]) and _fits(one, parts[1]) for key, one in value.items())
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, os.PathLike)
    if kind is Callable or kind is typing.get_origin(Callable[..., Any]):
        return callable(value)
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol
        return True


def _description(hint: Any) -> str:
    """A type in words.

    Example:
        >>> _description(str | Sequence[str] | None)
        'text, a list of text or None'
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, TypeVar):
        return _description(hint.__bound__)
    if origin in (typing.Union, types.UnionType):
        *first, last = dict.fromkeys(_description(part) for part in parts)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is typing.Literal:
        *first, last = (repr(one) for one in parts)
        return f"{', '.join(first)} or {last}" if first else last
    kind = origin or hint
    if kind in (list, tuple, Sequence):
        return f"a list of {_description(parts[0])}" if parts else "a list"
    if kind is Mapping and parts:
        return f"a dictionary from {_description(parts[0])} to {_description(parts[1])}"
    name = getattr(kind, "__name__", str(kind))
    return NAMES.get(name, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
