"""PIE-Bench with a tiny model: interrupted, resumed, shared out, measured; and its command line."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rectiflow.app.cli import main
from rectiflow.errors import InputError
from rectiflow.evaluate.metrics import psnr
from rectiflow.evaluate.pie_bench import Run, make_results, measure, write_tables
from rectiflow.evaluate.pie_bench_data import PICTURES, read_pie_bench
from rectiflow.evaluate.pie_bench_emoji import make_emoji_pie
from rectiflow.evaluate.pie_bench_metrics import Networks
from rectiflow.invert.presets import PRESETS
from rectiflow.models import Metadata, write_metadata
from rectiflow.models.base import FlowModel
from rectiflow.models.images import SizePolicy, fit, to_tensor
from rectiflow.models.load import load
from rectiflow.report import read_png
from rectiflow.steer import edit
from tests.app.forks import told
from tests.tiny import T5_LENGTH, tiny_sd3

PRESET = dataclasses.replace(PRESETS["euler"], num_inference_steps=2)
EDITS = 8


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd3().save_pretrained(folder)
    metadata = Metadata(family="sd3", max_sequence_length=T5_LENGTH, default_size=32)
    write_metadata(metadata, folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> FlowModel:
    return load(model_folder, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pie")
    make_emoji_pie(folder, EDITS)
    return folder


@pytest.fixture(scope="module")
def unbroken(model: FlowModel, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run from beginning to end in one process."""
    run = Run(read_pie_bench(data), PRESET, "euler", tmp_path_factory.mktemp("unbroken"))
    assert make_results(model, run) == []
    return run


def pictures(run: Run) -> dict[str, bytes]:
    """Every file of results, nothing unfinished among them."""
    folder = run.folder / PICTURES
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_results_are_those_of_edit_at_the_sources_size(model: FlowModel, unbroken: Run) -> None:
    assert len(pictures(unbroken)) == EDITS
    entry = unbroken.data.edits[1]
    alone = edit(
        model,
        entry.picture,
        source_prompt=entry.source_prompt,
        prompts=[entry.target_prompt],
        preset=PRESET,
    )
    with Image.open(unbroken.result(entry)) as written:
        assert written.size == (512, 512)
        assert np.array_equal(np.asarray(written), np.asarray(alone.images[0]))
    assert unbroken.result(entry).relative_to(unbroken.folder / PICTURES) == Path(entry.path)


def test_noise_is_an_items_own(unbroken: Run) -> None:
    """Where a method draws any, its seed is the preset's plus the place in the mapping file."""
    for number, entry in enumerate(unbroken.data.edits):
        made = read_png(unbroken.result(entry))
        assert entry.number == number
        assert made["settings"]["noise_seed"] == PRESET.noise_seed + number


def test_how_a_small_model_sees_the_pictures(unbroken: Run) -> None:
    """512 pixels are brought to 64 by Lanczos: close to what was enlarged, not equal."""
    for entry in unbroken.data.edits:
        with Image.open(entry.picture) as large:
            fitted, restore = fit(large, SizePolicy(multiple=16, largest=128, area=64 * 64))
            own = to_tensor(large)[..., ::8, ::8]
        assert fitted.shape == own.shape and restore.source_size == (512, 512)
        assert 25 < psnr(fitted, own).item() < 60


def test_what_exists_is_not_made_again(
    model: FlowModel, data: Path, unbroken: Run, tmp_path: Path
) -> None:
    run = dataclasses.replace(unbroken, output=tmp_path)
    first = dataclasses.replace(run, data=read_pie_bench(data, 2))
    make_results(model, first)
    kept = {edit.id: run.result(edit).stat().st_mtime_ns for edit in first.data.edits}
    (run.result(run.data.edits[3])).parent.mkdir(parents=True, exist_ok=True)
    # What a killed process leaves behind.
    picture = run.result(run.data.edits[3])
    unfinished = picture.with_name(f".{picture.name}-{'0' * 16}.tmp")
    unfinished.write_bytes(b"half a picture")
    assert make_results(model, run) == []
    assert not unfinished.exists()
    assert kept == {edit.id: run.result(edit).stat().st_mtime_ns for edit in first.data.edits}
    assert pictures(run) == pictures(unbroken)


def test_shards_are_disjoint_and_complete(model: FlowModel, unbroken: Run, tmp_path: Path) -> None:
    run = dataclasses.replace(unbroken, output=tmp_path)
    left = make_results(model, run, shard=(2, 2))
    assert [edit.id for edit in left] == [edit.id for edit in run.data.edits[::2]]
    assert make_results(model, run, shard=(1, 2)) == []
    assert pictures(run) == pictures(unbroken)


@pytest.mark.slow  # another process imports everything anew
def test_workers_make_the_same(model: FlowModel, unbroken: Run, tmp_path: Path) -> None:
    run = dataclasses.replace(unbroken, output=tmp_path)
    assert make_results(model, run, workers=2) == []
    assert pictures(run) == pictures(unbroken)


@pytest.mark.parametrize("what", ["preset", "weights", "data"])
def test_results_of_other_settings_are_not_mixed(
    model: FlowModel, unbroken: Run, tmp_path: Path, what: str
) -> None:
    run, other = unbroken, model
    if what == "preset":
        run = dataclasses.replace(run, preset=dataclasses.replace(PRESET, num_inference_steps=3))
    elif what == "weights":
        tiny_sd3(seed=1).save_pretrained(tmp_path)
        other = load(tmp_path, device="cpu")
    else:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, mapping_hash="0"))
    before = pictures(unbroken)
    with pytest.raises(InputError, match="choose another folder") as raised:
        make_results(other, run)
    name = {"preset": "preset", "weights": "weight hash", "data": "mapping hash"}[what]
    assert name in str(raised.value)
    assert pictures(unbroken) == before


def test_a_killed_run_goes_on_to_the_same_end(
    model_folder: Path, data: Path, unbroken: Run, model: FlowModel, tmp_path: Path
) -> None:
    """kill -9 in the middle, then the same again: every file as if nothing had happened."""
    command = ["evaluate", "pie-bench", "--data", str(data)]
    command += ["--model", str(model_folder), "--device", "cpu", "--preset", "euler"]
    command += ["--set", "num_inference_steps=2", "-o", str(tmp_path)]
    run = dataclasses.replace(unbroken, output=tmp_path)
    log, begun = tmp_path / "log", lambda: len(run.left) < EDITS
    assert told(command, begun, signal.SIGKILL, log) == -signal.SIGKILL, log.read_text()
    assert 0 < len(run.left) < EDITS
    assert make_results(model, run) == []
    assert pictures(run) == pictures(unbroken)


def test_tables_have_a_row_per_picture_and_per_kind(unbroken: Run) -> None:
    figures, rows = measure(unbroken, Networks())
    assert figures["n"] == EDITS and [row["id"] for row in rows] == [
        edit.id for edit in unbroken.data.edits
    ]
    assert figures["nfe"] == 4  # Euler's inversion and editing, two steps each
    assert set(figures["kinds"]) == set("01234567")
    images, kinds = (list(csv.DictReader(f.open())) for f in write_tables(unbroken, figures, rows))
    assert [row["kind"] for row in kinds] == [*"01234567", "all"]
    known = [
        float(row["corrected_background_mse"]) for row in images if row["quirk_background_mse"]
    ]
    assert float(kinds[-1]["corrected_background_mse"]) == pytest.approx(np.mean(known))
    assert int(kinds[-1]["corrected_background_mse_n"]) == len(known)
    full = [edit.id for edit in unbroken.data.edits if edit.mask().all()]
    assert full and [row["id"] for row in images if not row["quirk_background_psnr"]] == full


def test_the_command(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "pie-bench", "--data", str(data), "--model", str(model_folder)]
    words += ["--preset", "euler", "--set", "num_inference_steps=2", "--limit", "4"]
    words += ["--device", "cpu", "-o", str(tmp_path)]
    assert main([*words, "--shard", "1/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left"] == 2
    assert main([*words, "--clip", "emoji-clip"]) == 0
    printed = capsys.readouterr()
    (warning,) = printed.err.splitlines()
    assert "DINO" in warning and "LPIPS" in warning and "CLIP ViT" not in warning
    assert [line.split()[0] for line in printed.out.splitlines()[2:]] == ["quirk", "corrected"]
    assert main([*words, "--metrics", "quirk", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "euler" / "figures.json").read_text())
    assert printed["n"] == 4 and "quirk" in printed and "corrected" not in printed
    assert {"per-image.csv", "per-kind.csv", "settings.json"} <= {
        file.name for file in (tmp_path / "euler").iterdir()
    }


def test_the_command_refuses_in_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(data), "-o", str(tmp_path)]
    for words, remedy in (
        (["pie-bench", "-o", str(tmp_path)], "--data"),
        (["pie-bench", "--data", str(data)], "-o"),
        (["pie-bench", "--data", str(tmp_path), "-o", str(tmp_path)], "mapping_file.json"),
        (["pie-bench", *given, "--shard", "3/2"], "1/4"),
        (["pie-bench", *given, "--preset", "none"], "preset"),
    ):
        assert main(["evaluate", *words]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and remedy in printed.err and not printed.out
    assert (
        main(["evaluate", "pie-bench", "--make-data", str(tmp_path / "new"), "--limit", "1"]) == 0
    )
    assert len(read_pie_bench(tmp_path / "new").edits) == 1
