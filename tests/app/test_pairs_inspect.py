from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rectiflow.models.generate import generate_latents, initial_noise
from rectiflow.models.load import load
from tests.app.conftest import Run
from tests.straighten.stores import make_store

PROMPTS = ("a red apple on the background", "two cats")


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pairs: of the tiny model, one step each."""
    teacher = load(model)
    folder = tmp_path_factory.mktemp("store") / "pairs"
    x_0 = initial_noise(teacher, [100 + i for i in range(12)], 32, 32)
    x_1 = generate_latents(teacher, [PROMPTS[i % 2] for i in range(12)], x_0, num_inference_steps=1)
    make_store(
        folder,
        prompts=PROMPTS,
        x_1=dict(enumerate(x_1.x.half().float())),
        num=12,
        shard_size=4,
        model=str(model),
        weight_hash=teacher.weight_hash,
        latent_shape=(4, 8, 8),
        height=32,
        width=32,
    )
    return folder


def test_a_table(run: Run, store: Path) -> None:
    done = run("pairs", "inspect", store)
    assert done.code == 0 and not done.err, done
    head, *rows = done.out.splitlines()
    assert head == f"{store}: complete"
    table = {row[2:13].strip(): row[14:] for row in rows}
    assert table["pairs"] == "12 of 12 in 3 of 3 shards, generated"
    assert "euler, 4 steps, guidance 5, 32 × 32 pixels" in table["teacher"]
    assert "512 are x_1" in table["bytes"]
    assert table["prompts"] == "2, 6 pairs each"
    assert all(name in table["cost"] for name in ("l2_squared", "l2", "log_cosh", "±"))
    assert table["same noise"] == table["same image"] == "none"
    assert max(map(len, rows)) < 180


def test_json_and_pictures(run: Run, store: Path, tmp_path: Path) -> None:
    done = run("pairs", "inspect", store, "-o", tmp_path / "out", "--json")
    assert done.code == 0 and not done.err, done
    data = done.data
    assert data["pairs"] == 12 and data["complete"] and data["faults"] == []
    assert data["pictures"] == "pairs.png"
    assert json.loads((tmp_path / "out" / "pairs.json").read_text()) == data
    with Image.open(tmp_path / "out" / "pairs.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # 8 from all over, 4 of the longest, 4 of the shortest; 32 pixels, four times enlarged.
    assert pixels.shape[1] == 4 * 130 and pixels.shape[0] == 4 * (128 + 2 + 12)


def test_the_pictures_are_those_of_the_pairs(
    run: Run, store: Path, model: Path, tmp_path: Path
) -> None:
    """The first of the sheet is pair 0, decoded by the store's own teacher."""
    from rectiflow.straighten.reading import PairStore

    assert run("pairs", "inspect", store, "-o", tmp_path).code == 0
    x_1 = PairStore.open(store).pairs([0]).x_1
    expected = (load(model).decode(x_1)[0].permute(1, 2, 0) * 255).round().clamp(0, 255)
    with Image.open(tmp_path / "pairs.png") as sheet:
        found = np.asarray(sheet.convert("RGB"))[0:128:4, 0:128:4]
    np.testing.assert_allclose(found, expected.to(torch.uint8).numpy(), atol=1)


def test_damage_is_named_and_the_exit_code_is_1(run: Run, store: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(store, folder)
    file = folder / "shard-000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    done = run("pairs", "inspect", folder)
    assert done.code == 1
    assert done.err.count("\n") == 1 and "shard-000001.safetensors is damaged" in done.err
    assert "run the same `rectiflow pairs` command again" in done.err
    assert "1 shards missing or damaged" in done.out and "8 of 12 in 2 of 3 shards" in done.out
    (folder / "shard-000002.json").unlink()
    done = run("pairs", "inspect", folder, "--json")
    assert done.code == 1 and len(done.data["faults"]) == 2
    assert "and 1 more of 3 shards" in done.err


def test_an_unfinished_store_is_not_damaged(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path, shards=[0])
    done = run("pairs", "inspect", tmp_path)
    assert done.code == 0 and not done.err
    assert done.out.startswith(f"{tmp_path}: not complete\n") and "5 of 23 in 1 of 5" in done.out


def test_a_store_without_a_pair(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "store", shards=[])
    done = run("pairs", "inspect", tmp_path / "store", "-o", tmp_path / "out", "--json")
    assert done.code == 0 and done.data["pairs"] == 0 and done.data["pictures"] is None
    assert "no pictures: the store has no sound pair yet" in done.err


def test_a_teacher_that_is_not_there(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "store", model="/nowhere/teacher")
    done = run("pairs", "inspect", tmp_path / "store", "-o", tmp_path / "out")
    assert done.code == 0 and "no pictures: " in done.err and "--model" in done.err
    assert not (tmp_path / "out" / "pairs.png").exists()
    run("pairs", "inspect", tmp_path / "store", "-o", tmp_path / "out", "-m", "./no").refuses("no")


def test_another_model(run: Run, store: Path, tmp_path: Path) -> None:
    """Other weights draw, with a warning; other latents do not."""
    from tests.tiny import tiny_sd3

    tiny_sd3(seed=1).save_pretrained(tmp_path / "other")
    done = run("pairs", "inspect", store, "-o", tmp_path / "out", "-m", tmp_path / "other")
    assert done.code == 0 and "other weights than the store's teacher" in done.err
    assert (tmp_path / "out" / "pairs.png").is_file()
    make_store(tmp_path / "store", latent_shape=(4, 6, 6), height=32, width=32)
    done = run("pairs", "inspect", tmp_path / "store", "-o", tmp_path, "-m", tmp_path / "other")
    done.refuses("latents of [4, 8, 8] and the store of [4, 6, 6]")


def test_bad_input(run: Run, store: Path, tmp_path: Path) -> None:
    run("pairs", "inspect", tmp_path / "nothing").refuses("there is no store of pairs at")
    run("pairs", "inspect", store, "-m", "emoji-sd3").refuses("--model is for pictures")
    run("pairs", "inspect", "nosuch://place").refuses("nosuch://place")
    (tmp_path / "file").write_text("")
    run("pairs", "inspect", store, "-o", tmp_path / "file").refuses("cannot write to")


def test_a_limit(run: Run, store: Path) -> None:
    data = run("pairs", "inspect", store, "--limit", 5, "--json").data
    assert data["examined"] == 5 and data["pairs"] == 12
    assert run("pairs", "inspect", store, "--limit", 0, "--json").data["examined"] == 12
