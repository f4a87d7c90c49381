"""What the model hub has to say about a model, in one line: gated, missing, out of reach."""

from __future__ import annotations

from collections.abc import Iterator

from rectiflow.errors import InputError

PAGE = "https://huggingface.co/"


def hub_answers(name: str) -> bool:
    """Whether the hub can be asked; if not, what has been downloaded before is used at once.

    Raises:
        InputError: It answers that there is no such model, or that it is not for everybody.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # the client's HTTP library, hence its errors, change by version
        refused = refusal(name, error)
        if refused is not None:
            raise refused from error
        return False
    return True


def refusal(name: str, error: BaseException) -> InputError | None:
    """The line for an answer of the hub's that says no, however deep a library has wrapped it.

    Args:
        name: The model's id.
        error: What was raised; its causes are looked at too.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            return InputError(
                f"{name} is gated: accept its licence at {PAGE}{name}, then log in with "
                "`hf auth login`"
            )
        if isinstance(cause, RevisionNotFoundError):
            return InputError(f"{name} has no such revision on the hub: see {PAGE}{name}/tree/main")
        if isinstance(cause, RepositoryNotFoundError):
            return InputError(
                f"there is neither a folder {name!r} nor such a model on the hub (for a private "
                "one, log in with `hf auth login`)"
            )
    return None


def unreachable(name: str) -> InputError:
    """The line for a model of which nothing is here while the hub does not answer."""
    return InputError(
        f"there is no folder {name!r}, the hub cannot be reached, and its cache has no copy of "
        f"{name}: connect once to download it, or give a folder"
    )


def partly_cached(name: str, what: str) -> InputError:
    """The line for a download that was never finished while the hub does not answer.

    Args:
        name: The model's id.
        what: What was found to be missing.
    """
    return InputError(
        f"only a part of {name} is in the hub's cache ({what}), and the hub cannot be reached: "
        "connect and run this again to download the rest"
    )


def first_sentence(error: BaseException) -> str:
    """The first sentence of a message of one of the libraries, which write paragraphs."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(". ")[0].rstrip(".")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
