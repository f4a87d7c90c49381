"""The hub's answers in one line each, from the real exceptions of its client and a real cache."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, errors
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rectiflow.errors import InputError
from rectiflow.models import load, write_metadata
from rectiflow.models.hub import refusal
from tests.models.test_load import METADATA
from tests.tiny import tiny_sd3

NAME = "somebody/tiny"
# The client's HTTP library goes by another name from version to version.
httpx = importlib.import_module(errors.Response.__module__.partition(".")[0])


def raised(error: type[Exception]) -> Exception:
    """As the client raises it for an answer of the hub's."""
    request = httpx.Request("GET", f"https://huggingface.co/api/models/{NAME}")
    return error(
        "403 Client Error. (Request ID: 1)\nOver lines.",
        response=httpx.Response(403, request=request),
    )


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What the hub says to a question about a model."""
    said: list[Exception] = []

    def model_info(*_: object, **__: object) -> None:
        raise said[0]

    monkeypatch.setattr(HfApi, "model_info", model_info)
    return said


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot in a cache laid out as the client does; returns the snapshot's folder."""
    for place in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, place, str(tmp_path), raising=False)
    repository = tmp_path / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    tiny_sd3(t5=True).save_pretrained(snapshot)
    write_metadata(METADATA, snapshot)
    return snapshot


def refuses(*words: str, **arguments: object) -> None:
    with pytest.raises(InputError) as caught:
        load(NAME, **arguments)  # type: ignore[arg-type]
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_gated(answer: list[Exception]) -> None:
    answer.append(raised(GatedRepoError))
    words = (f"{NAME} is gated", f"https://huggingface.co/{NAME}", "hf auth login")
    refuses(*words)


def test_missing(answer: list[Exception]) -> None:
    answer.append(raised(RepositoryNotFoundError))
    refuses(f"neither a folder '{NAME}' nor such a model", "hf auth login")


def test_a_refusal_is_found_inside_what_libraries_make_of_it() -> None:
    """A gated model's page is public: the client says no only when a file is fetched."""
    try:
        try:
            raise raised(GatedRepoError)
        except GatedRepoError as error:
            raise OSError("is not a valid model identifier") from error
    except OSError as error:
        found = refusal(NAME, error)
    assert found is not None and "is gated" in str(found)
    assert refusal(NAME, OSError("disk")) is None


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), httpx.ConnectError("no route")])
def test_offline_with_nothing_cached(answer: list[Exception], error: Exception) -> None:
    answer.append(error)
    refuses("the hub cannot be reached", "no copy", "connect once")


def test_offline_with_a_complete_copy(cache: Path, answer: list[Exception]) -> None:
    answer.append(httpx.ConnectError("no route"))
    model = load(NAME)
    assert model.name == NAME and model.metadata == METADATA
    assert model.weight_hash == load(cache).weight_hash


@pytest.mark.parametrize(
    ("missing", "word"),
    [
        ("vae", "the folder vae is missing"),
        ("tokenizer_2", "the folder tokenizer_2 is missing"),
        ("text_encoder/model.safetensors", "model.safetensors"),
        ("transformer/diffusion_pytorch_model.safetensors", "transformer"),
    ],
)
def test_offline_with_a_part_of_a_copy(
    cache: Path, answer: list[Exception], missing: str, word: str
) -> None:
    answer.append(httpx.ConnectError("no route"))
    place = cache / missing
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    refuses(f"only a part of {NAME} is in the hub's cache", word, "connect")


def test_offline_with_a_copy_of_a_variant_and_another_revision(
    cache: Path, answer: list[Exception]
) -> None:
    answer.append(httpx.ConnectError("no route"))
    expected = load(cache).weight_hash
    (cache.parents[1] / "refs" / "half").write_text("1" * 40)
    half = cache.with_name("1" * 40)
    tiny_sd3(t5=True).save_pretrained(half, variant="fp16")
    refuses("variant fp16 alone", "--variant fp16", revision="half")
    refuses("no weight files of the variant bf16", "those of fp16", revision="half", variant="bf16")
    model = load(NAME, revision="half", variant="fp16")
    assert model.weight_hash == expected
    assert model.loaded_with == {"revision": "half", "variant": "fp16"}
    refuses("no copy", revision="other")


def test_a_revision_that_is_not_there(answer: list[Exception]) -> None:
    found = refusal(NAME, raised(RevisionNotFoundError))
    assert found is not None and f"{NAME} has no such revision" in str(found)
