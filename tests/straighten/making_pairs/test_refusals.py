"""Making pairs: what is refused, and leaves things as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.models.base import FlowModel
from rectiflow.straighten.manifest import MANIFEST, PROMPTS
from tests.straighten.pair_making import (
    LIST,
    contents,
    make,
)
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num": 30}, r"with num 23, and 30 are asked for: .* the other 7 .* with seed 63"),
        ({"num": 20}, "with num 23, and 20 is asked for: give the same, or another address"),
        ({"solver": "heun"}, "with solver 'euler', and 'heun' is asked for"),
        ({"num_inference_steps": 3}, "with num_inference_steps 2, and 3 is asked for"),
        ({"guidance_scale": 5.0}, "with guidance_scale 2.5, and 5.0 is asked for"),
        ({"negative_prompt": "a dog"}, "with negative_prompt None, and 'a dog' is asked for"),
        ({"seed": 41}, "with base_seed 40, and 41 is asked for"),
        ({"batch_size": 4}, "with batch_size 3, and 4 is asked for"),
        ({"shard_size": 8}, "with shard_size 7, and 8 is asked for"),
        ({"height": 40}, "with height 32, and 40 is asked for"),
        ({"prompts": LIST[:4]}, "with another prompt list, of 5 prompts with prompts_sha256"),
        ({"prompts": [*LIST[:4], "a cat"]}, "with another prompt list"),
    ],
)
def test_other_settings_are_refused(
    model: FlowModel, whole: Path, change: dict[str, Any], line: str
) -> None:
    before = contents(whole)
    with pytest.raises(InputError, match=line) as error:
        make(model, whole, **change)
    assert "\n" not in str(error.value) and str(whole) in str(error.value)
    assert contents(whole) == before


def test_another_teacher_is_refused(whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(InputError, match="is of another teacher, tiny with weight_hash"):
        make(tiny_model(seed=1), whole)
    with pytest.raises(InputError, match="with dtype 'float32', and 'bfloat16' is asked for"):
        make(tiny_model(dtype=torch.bfloat16), whole)
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"prompts": []}, "no prompt: give one or more"),
        ({"num": 0}, "num is 0: give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"solver": "dpmm"}, "unknown solver 'dpmm'"),
        ({"height": 33}, "height 33 and width 32 must both be multiples of 8"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63 - 2}, "give one from 0 to"),
        ({"worker": 3, "num_workers": 3}, "worker is 3 of 3"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"images": [Path("a.png")]}, "5 captions for 1 images"),
    ],
)
def test_impossible_settings_write_nothing(
    model: FlowModel, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError, match=line):
        make(model, tmp_path / "store", **change)
    assert not (tmp_path / "store").exists()


def test_folders_of_something_else_are_left_alone(model: FlowModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        InputError, match=r"holds something else .* \(thesis.txt\): choose an empty"
    ):
        make(model, tmp_path)
    (tmp_path / MANIFEST).write_text('{"name": "my web app"}')
    with pytest.raises(InputError, match=r"manifest.json is not the manifest of a store of pairs"):
        make(model, tmp_path)
    assert set(contents(tmp_path)) == {"thesis.txt", MANIFEST}


def test_pairs_that_are_not_numbers_are_not_stored(tmp_path: Path) -> None:
    """Found only in the second batch: what was made before it is kept."""
    model = tiny_model()
    calls = 0

    def spoil(module: torch.nn.Module, args: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal calls
        calls += 1
        return (output[0] * (1e6 if calls > 1 + 2 * 3 else 1),)

    model.network.register_forward_hook(spoil)
    with pytest.raises(WorkError, match="pairs 7 to 9: latents that float16 cannot hold"):
        make(model, tmp_path / "store")
    files = set(contents(tmp_path / "store"))
    assert files == {MANIFEST, PROMPTS, "shard-000000.safetensors", "shard-000000.json"}
