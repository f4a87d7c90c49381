"""``rectiflow evaluate emoji-edits`` on a tiny model: its table, tuning, ablations, resuming."""

from __future__ import annotations

import csv
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from rectiflow.evaluate import edit_ablations, edit_tuning
from rectiflow.models import Metadata, write_metadata
from tests.app.conftest import Run
from tests.app.forks import told
from tests.tiny import T5_LENGTH, tiny_sd3


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without T5, which takes two thirds of the time."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd3().save_pretrained(folder)
    write_metadata(Metadata(family="sd3", max_sequence_length=T5_LENGTH, default_size=32), folder)
    return folder


def timeless(figures: Any) -> Any:
    """Figures without what differs from run to run."""
    if isinstance(figures, dict):
        return {key: timeless(value) for key, value in figures.items() if key != "seconds"}
    return [timeless(value) for value in figures] if isinstance(figures, list) else figures


def test_a_table_its_files_and_its_page(run: Run, sd3: Path, tmp_path: Path) -> None:
    words = ("evaluate", "emoji-edits", "-m", sd3, "--limit", 4, "--json")
    tuned = tmp_path / "tuning.json"
    chosen = {"num_inference_steps": 2}
    tuned.write_text(json.dumps({"methods": {"euler": {"chosen": chosen}}}))
    methods = ("--methods", "nothing,euler,fast", "--tuned", tuned, "-o", tmp_path)
    figures = run(*words, *methods).data
    assert figures["masks"] == "none"
    assert list(figures["methods"]) == ["nothing", "euler", "euler (tuned)", "fast"]
    assert figures["methods"]["euler (tuned)"]["nfe"] == 4
    assert json.loads((tmp_path / "emoji-edits.json").read_text()) == figures
    with (tmp_path / "emoji-edits-per-edit.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 16
    mine = [float(row["target_psnr"]) for row in rows if row["method"] == "fast"]
    assert sum(mine) / 4 == pytest.approx(figures["methods"]["fast"]["target_psnr"])
    with (tmp_path / "emoji-edits.csv").open(newline="") as opened:
        assert [row["method"] for row in csv.DictReader(opened)] == list(figures["methods"])

    # Told where the edit belongs: files of their own, and both tables on the page.
    given = run(*words, *methods, "--masks", "given").data
    assert given["masks"] == "given"
    assert (
        given["methods"]["nothing"]["target_psnr"] == figures["methods"]["nothing"]["target_psnr"]
    )
    assert given["methods"]["fast"]["outside_mse"] != figures["methods"]["fast"]["outside_mse"]
    assert json.loads((tmp_path / "emoji-edits.json").read_text()) == figures
    page = (tmp_path / "emoji-edits-masked.html").read_text()
    assert "told where the edit belongs" in page and "without masks" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for rank in (1, 2, 3, 4):
        assert page.count(f"Rank {rank} of 4") == 1
    assert page.count('<img src="data:') == 4 * (2 + 3)


def test_tuning_tries_the_published_setting_and_the_budget(
    run: Run, sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [{"num_inference_steps": 2}, {"num_inference_steps": 3}]
    monkeypatch.setitem(edit_tuning.CANDIDATES, "euler", few)
    words = ("evaluate", "emoji-edits", "-m", sd3, "--tune", "--methods", "euler", "--limit", 2)
    figures = run(*words, "-o", tmp_path, "--json").data
    assert figures["seeds"] == [1_000_000, 1_000_000] and figures["n"] == 2
    tried = figures["methods"]["euler"]["candidates"]
    assert [entry["settings"] for entry in tried] == [{}, *few]
    best = max(tried, key=lambda entry: entry["target_psnr"])
    assert figures["methods"]["euler"]["chosen"] == best["settings"]
    assert json.loads((tmp_path / "tuning.json").read_text()) == figures
    # Nothing is tried twice.
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").iterdir()}
    assert len(files) == 3
    done = run(*words, "-o", tmp_path)
    assert "published and chosen" in done.out
    assert files == {f: f.stat().st_mtime_ns for f in (tmp_path / "parts").iterdir()}


def test_told_to_stop_it_keeps_its_parts_and_goes_on(run: Run, sd3: Path, tmp_path: Path) -> None:
    words = ("evaluate", "emoji-edits", "-m", str(sd3), "--limit", "2", "--methods", "euler,fast")
    parts, log = tmp_path / "out" / "parts", tmp_path / "log"
    code = told([*words, "-o", str(tmp_path / "out")], lambda: any_file(parts), signal.SIGTERM, log)
    assert code == 75 and log.read_text().endswith("the same command goes on from what is there\n")
    before = {file: file.stat().st_mtime_ns for file in parts.iterdir()}
    assert len(before) == 1
    assert run(*words, "-o", tmp_path / "out", "--json").code == 0
    assert before.items() <= {f: f.stat().st_mtime_ns for f in parts.iterdir()}.items()


def any_file(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("[!.]*"))


def test_ablations_write_figures_a_table_and_plots(
    run: Run, sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"num_inference_steps": 3}
    few = {
        "iterations": (0, 2),
        "compensation": ("none", "both"),
    }
    kept = {name: edit_ablations.ABLATIONS[name] for name in few}
    for name, ablation in kept.items():
        series = {
            label: (base, {**overrides, **short})
            for label, (base, overrides) in ablation.series.items()
        }
        kept[name] = edit_ablations.replace(ablation, values=few[name], series=series)
    monkeypatch.setattr(edit_ablations, "ABLATIONS", kept)
    words = ("evaluate", "emoji-edits", "-m", sd3, "--ablations", "--limit", 2)
    found = run(*words, "-o", tmp_path, "--json").data["ablations"]
    iterations = found["iterations"]["series"]
    assert list(iterations) == ["fast's controls, last", "ftedit, last", "ftedit, average"]
    for entry in iterations.values():
        assert [point["value"] for point in entry["points"]] == [0, 2]
        assert str(entry["best"]) in entry["sentence"]
    # An inversion that is solved comes back better.
    first, last = iterations["fast's controls, last"]["points"]
    assert first["reconstruction_psnr"] < last["reconstruction_psnr"]
    assert first["nfe"] < last["nfe"]
    assert {file.name for file in (tmp_path / "ablations").iterdir()} == {
        *(f"{name}.{ending}" for name in few for ending in ("json", "csv", "svg")),
        "iterations-reconstruction-psnr.svg",
    }


@pytest.mark.slow
def test_several_processes_give_what_one_gives(run: Run, sd3: Path, tmp_path: Path) -> None:
    words = ("evaluate", "emoji-edits", "-m", sd3, "--limit", 2, "--json")
    methods = ("--methods", "nothing,bound,euler")
    one = run(*words, *methods).data
    two = run(*words, *methods, "--processes", 2, "-o", tmp_path).data
    assert timeless(one) == timeless(two)


def test_rows_are_put_into_a_table_that_is_there(run: Run, sd3: Path, tmp_path: Path) -> None:
    words = ("evaluate", "emoji-edits", "-m", sd3, "-o", tmp_path, "--json", "--limit", 2)
    whole = run(*words, "--methods", "nothing,fast,euler").data
    page = (tmp_path / "emoji-edits.html").stat().st_mtime_ns
    # As it is after a change of the method: its rows are not those of the table any more.
    file = tmp_path / "emoji-edits.json"
    stale = json.loads(file.read_text())
    stale["methods"]["fast"]["nfe"] = 90
    file.write_text(json.dumps(stale))
    found = run(*words, "--update", "--methods", "fast").data
    assert timeless(found)["methods"] == timeless(whole)["methods"]
    assert list(found["methods"]) == ["nothing", "fast", "euler"]
    assert not found["paired"]  # with rows that were not measured again
    found = run(*words, "--update", "--methods", "nothing,fast").data
    assert found["paired"] == {"fast - nothing": whole["paired"]["fast - nothing"]}
    # A row that comes out as it was keeps what it was compared with.
    file.write_text(json.dumps(whole))
    assert run(*words, "--update", "--methods", "fast").data["paired"] == whole["paired"]
    file.write_text(json.dumps(found))
    assert json.loads(file.read_text()) == found
    assert (tmp_path / "emoji-edits.html").stat().st_mtime_ns == page
    more = ("--update", "--methods", "fast")
    few = ("evaluate", "emoji-edits", "-m", sd3, *more)
    run(*few, "-o", tmp_path, "--limit", 1).refuses("has n 2 and not 1")
    run(*few, "-o", tmp_path / "empty").refuses("--update needs -o with a table")
    run("evaluate", "emoji-edits", "--update").refuses("name them with --methods")


def test_a_killed_run_goes_on_and_ends_the_same(run: Run, sd3: Path, tmp_path: Path) -> None:
    words = ["evaluate", "emoji-edits", "-m", sd3, "--limit", 4, "--batch-size", 1, "--json"]
    words += ["--methods", "nothing,euler"]
    unbroken = run(*words, "-o", tmp_path / "unbroken").data
    folder = tmp_path / "killed"
    command, log = [*map(str, words), "-o", str(folder)], tmp_path / "log"

    def begun() -> bool:
        return bool(list((folder / "parts").glob("euler-*.safetensors")))

    assert told(command, begun, signal.SIGKILL, log) == -signal.SIGKILL, log.read_text()
    assert not (folder / "emoji-edits.json").exists()
    (before,) = (folder / "parts").glob("nothing-*.safetensors")
    untouched = before.stat().st_mtime_ns
    resumed = run(*words, "-o", folder).data
    assert timeless(resumed) == timeless(unbroken)
    assert before.stat().st_mtime_ns == untouched


def test_what_is_refused(run: Run, sd3: Path, tmp_path: Path) -> None:
    words = ("evaluate", "emoji-edits", "-m", sd3)
    run(*words, "--methods", "eulr").refuses("eulr", "euler")
    run(*words, "--methods", ",").refuses("--methods")
    run(*words, "--tune", "--ablations").refuses("--tune", "--ablations")
    run(*words, "--tune", "--masks", "given").refuses("--masks")
    run(*words, "--ablations", "--methods", "exact").refuses("--methods")
    run(*words, "--tune", "--methods", "nothing").refuses("nothing")
    run(*words, "--limit", 1, "--methods", "bound", "--processes", 2).refuses("-o")
    run(*words, "--tuned", tmp_path / "none.json").refuses("none.json")
    (tmp_path / "other.json").write_text("[]")
    run(*words, "--tuned", tmp_path / "other.json").refuses("--tune")
