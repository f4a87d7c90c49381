"""The commands by two processes: the pairs of one, and at the same global batch its loss curve."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.app.forks import Ended, Forks
from tests.app.script import NUM, PAIRS, same
from tests.straighten.toy import records


def by_two(forks: Forks, *words: object, cwd: Path) -> Ended:
    """Two processes told what torchrun tells them; how the first ended, the second being silent."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        forks.start(
            *words,
            cwd=cwd,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    first, second = [
        Ended(p.returncode, *said)
        for p, said in [(p, p.communicate(timeout=300)) for p in processes]
    ]
    assert second == (0, "", ""), second
    return first


def pair_words(teacher: Path) -> list[str]:
    """As the script asks for its first pairs."""
    words = ["pairs", "--model", str(teacher / "tiny"), "--prompts", str(teacher / "prompts.txt")]
    words += ["--solver", "dpmpp", "--guidance", "5", "--num", str(NUM), *PAIRS.split()]
    return [*words, "--out", "pairs-1", "--json"]


def training_words(kind: str, teacher: Path, whole: Path) -> list[str]:
    """As the script asks for its training, into a folder of the same name."""
    model, pairs = {
        "reflow": (teacher / "tiny", whole / "pairs-1"),
        "distill": (whole / "2rf", whole / "pairs-2"),
    }[kind]
    words = [kind, "--model", str(model), "--pairs", str(pairs), "-o", kind, "--json"]
    return [*words, "--config", str(teacher / "short.yaml")]


def close(run: Path, whole: Path) -> None:
    """The same curve to 1e-5, the same measures, and nearly the same weights."""
    mine, theirs = records(run), records(whole)
    assert len(mine) == len(theirs) > 4
    for one, another in zip(mine, theirs, strict=True):
        assert one["step"] == another["step"]
        assert one["loss"] == pytest.approx(another["loss"], abs=1e-5)
        measures = [record.get("measures", {}) for record in (one, another)]
        assert measures[0] == pytest.approx(measures[1], rel=1e-4)
    file = "model/unet/diffusion_pytorch_model.safetensors"
    begun = [load_file(folder / file) for folder in (run, whole)]
    for name, weight in begun[0].items():
        torch.testing.assert_close(weight, begun[1][name], rtol=0, atol=1e-4, msg=name)


def test_two_processes_make_the_pairs_of_one(
    script_whole: Path, script_teacher: Path, forks: Forks, tmp_path: Path
) -> None:
    """At the same time, each its shards."""
    done = by_two(forks, *pair_words(script_teacher), cwd=tmp_path)
    assert done.code == 0 and json.loads(done.out)["num_workers"] == 2
    same(tmp_path / "pairs-1", script_whole / "pairs-1")


@pytest.mark.parametrize("kind", ["reflow", "distill"])
def test_two_processes_have_the_curve_of_one(
    kind: str, script_whole: Path, script_teacher: Path, forks: Forks, tmp_path: Path
) -> None:
    words = training_words(kind, script_teacher, script_whole)
    done = by_two(forks, *words, cwd=tmp_path)
    assert done.code == 0 and json.loads(done.out)["finished"], done
    close(tmp_path / kind, script_whole / kind)
    # The steps were really shared, not taken twice: the same command in one process goes on.
    again = forks(*words, cwd=tmp_path)
    assert json.loads(again.out)["phases"][0]["step"] == 14


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_by_torchrun(script_whole: Path, script_teacher: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", "2", "-m", "rectiflow", "--"]
    for words in (
        pair_words(script_teacher),
        training_words("reflow", script_teacher, script_whole),
        training_words("distill", script_teacher, script_whole),
    ):
        done = subprocess.run([*launch, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
    same(tmp_path / "pairs-1", script_whole / "pairs-1")
    for kind in ("reflow", "distill"):
        close(tmp_path / kind, script_whole / kind)
