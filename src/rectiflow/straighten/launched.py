"""Which of several processes this one is, as torchrun says it in the environment."""

from __future__ import annotations

import os

from rectiflow.errors import InputError


def place() -> tuple[int, int]:
    """This process's number, from 0, and how many there are.

    Raises:
        InputError: RANK, LOCAL_RANK or WORLD_SIZE are not such numbers.
    """
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    for name in numbers:
        text = os.environ.get(name, "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 10):
            raise InputError(
                f"{name} in the environment is {text!r} and not a number: unset it, or start "
                "several processes with torchrun"
            )
        numbers[name] = int(text or numbers[name])
    if not numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise InputError(
            f"RANK {numbers['RANK']} of WORLD_SIZE {numbers['WORLD_SIZE']} in the environment is "
            "none: unset them, or start several processes with torchrun"
        )
    return numbers["RANK"], numbers["WORLD_SIZE"]


def check_meeting() -> None:
    """See that several processes know where to meet.

    Raises:
        InputError: They do not, or are no numbers.
    """
    _, count = place()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if count > 1 and missing:
        raise InputError(
            f"WORLD_SIZE in the environment is {count}, and {missing[0]} is not there: unset it, "
            "or start several processes with torchrun"
        )
