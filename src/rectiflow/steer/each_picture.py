"""Several pictures to one function that edits one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, cast, overload

from rectiflow.errors import InputError
from rectiflow.models.base import FlowModel
from rectiflow.steer.edit_result import EditResult

P = ParamSpec("P")
EACH = ("mask", "source_prompt")
"""What may be a list too, one for each picture."""


class Edit(Protocol[P]):
    """A function that edits a picture, or each of several."""

    @overload
    def __call__(self, *args: P.args, **given: P.kwargs) -> EditResult: ...
    @overload
    def __call__(
        self, model: FlowModel, image: list[Any] | tuple[Any, ...], **given: Any
    ) -> list[EditResult]: ...


def each_picture(function: Callable[P, EditResult]) -> Edit[P]:
    """Let a list of pictures give a list of results.

    Raises:
        InputError: in the function's place: another number of masks or source prompts.
    """

    @functools.wraps(function)
    def call(model: FlowModel, image: Any = None, **given: Any) -> Any:
        one = cast("Callable[..., EditResult]", function)
        if not isinstance(image, list | tuple):
            return one(model, image, **given)
        if not image:
            raise InputError("image is an empty list: give one picture or more")
        lists = {name: given[name] for name in EACH if isinstance(given.get(name), list | tuple)}
        for name, values in lists.items():
            if len(values) != len(image):
                raise InputError(
                    f"{len(values)} of {name} for {len(image)} pictures: give one for all or one "
                    "each"
                )
        return [
            one(model, picture, **given | {name: values[number] for name, values in lists.items()})
            for number, picture in enumerate(image)
        ]

    return cast("Edit[P]", call)
