"""Where ours and the official code differ is said: a row for every preset, a word in every file."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from rectiflow.flow.grid import active_steps
from rectiflow.invert import PRESETS, SCHEMES
from rectiflow.steer import METHODS

DOCS = Path(__file__).parents[2] / "docs"
SECTION = (DOCS / "methods.md").read_text().partition("### Where a preset is not the official code")
TABLE = SECTION[2].partition("\n## ")[0]
SHARES = ("strength", "adaln_ratio", "attention_ratio", "eta_ratio")


def test_every_preset_has_its_row() -> None:
    rows = [line.split("|")[1] for line in TABLE.splitlines() if line.startswith("|")]
    named = set(re.findall(r"`([a-z-]+)`", " ".join(rows)))
    assert named == set(PRESETS)


def test_sizes_are_those_that_were_printed() -> None:
    for name, size in json.loads((DOCS / "results" / "official.json").read_text()).items():
        assert f"{size['median']:.2g}".replace("e-0", "e-") in TABLE, name
        assert name.startswith("ddim") or f"{size['max']:.2g}" in TABLE, name


@pytest.mark.parametrize(
    "module",
    sorted(
        {type(scheme).__module__ for scheme in SCHEMES.values()}
        | {method.__module__ for method in METHODS.values()}
    ),
)
def test_every_file_of_a_method_says_what_the_official_code_does(module: str) -> None:
    told = importlib.import_module(module).__doc__ or ""
    assert re.search(r"official|`DDIMInverseScheduler`", told)


def test_no_published_setting_is_cut_otherwise() -> None:
    """Truncating the product in floating point loses no step of any preset's shares."""
    for name, preset in PRESETS.items():
        for field in SHARES:
            share = getattr(preset, field)
            for steps in (preset.num_inference_steps, preset.steps):
                assert int(share * steps) == active_steps(share, steps), (name, field)
