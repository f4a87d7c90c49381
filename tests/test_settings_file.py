"""Settings are read as YAML 1.2 and written so that YAML 1.1 reads them alike."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from rectiflow.errors import InputError
from rectiflow.settings_file import dump_yaml, parse_yaml, read_yaml

TEXTS = (
    "no yes on off y n No ON Off 1_000 1:30 190:20:30 2026-12-01 2001-12-14t21:59:43Z 0b11 0o8 0xg "
    "1e 1e-4x nul True1 = ."
).split()
"""Texts by the tables of https://yaml.org/spec/1.2.2/#103-core-schema."""

OTHERS: dict[str, Any] = {
    "": None,
    "~": None,
    "null": None,
    "NULL": None,
    "true": True,
    "FALSE": False,
    "010": 10,
    "-7": -7,
    "0o17": 15,
    "0x1F": 31,
    "1e-4": 1e-4,
    "1E5": 1e5,
    ".5": 0.5,
    "-2.": -2.0,
    "-.inf": -math.inf,
}


def test_plain_scalars_are_those_of_the_core_schema() -> None:
    for text in TEXTS:
        assert parse_yaml(text) == text
    for text, value in OTHERS.items():
        found = parse_yaml(text)
        assert found == value and type(found) is type(value), text
    assert math.isnan(parse_yaml(".nan"))
    assert parse_yaml("a: [1, {b: no}]\nc:\n- 1e-6") == {"a": [1, {"b": "no"}], "c": [1e-6]}


def test_what_is_written_is_read_alike_by_both_versions() -> None:
    data = {text: text for text in (*TEXTS, *OTHERS)}
    data |= {"a": 1e-6, "b": [True, None, 1e22, -3], "c": "two\nlines", "d": {"ä": "a: b"}}
    written = dump_yaml(data)
    assert parse_yaml(written) == data
    assert yaml.safe_load(written) == data


def test_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for content, words in {
        "a: 1\nb: 2\na: 3": "the key 'a' is there twice",
        "a: [": "c.yaml is not YAML",
        "a: !!python/name:os.system x": "c.yaml is not YAML",
        "a: !!timestamp x": "c.yaml is not YAML",
        "- a": "holds no settings",
        "[" * 5000: "nested more than 64 deep",
        "a: " + "[" * 99 + "]" * 99: "nested more than 64 deep",
        "a: &a [*a]": "nested more than 64 deep",
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"  # a billion values, by reference
        + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefghi")
        ): "more than 100000 values",
    }.items():
        file.write_text(content)
        with pytest.raises(InputError, match=words) as found:
            read_yaml(file)
        assert "\n" not in str(found.value)
    with pytest.raises(InputError, match=r"none.yaml is not there"):
        read_yaml(tmp_path / "none.yaml")
