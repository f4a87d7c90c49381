"""Lists of prompts from files, and what is said of those that are wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from rectiflow.errors import InputError
from rectiflow.straighten.prompt_list import load_prompts

PROMPTS = ["a red cat", "zwei Äpfel, und ein Bär", 'say "no"', "one\u2028line"]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("name", ["p.txt", "p", "my:prompts.txt"])
def test_text(tmp_path: Path, name: str, end: str) -> None:
    assert load_prompts(written(tmp_path / name, "\n".join(PROMPTS) + end)) == PROMPTS
    windows = "\ufeff" + "\r\n".join(f"  {p}\t" for p in PROMPTS) + end
    assert load_prompts(written(tmp_path / name, windows)) == PROMPTS


def test_jsonl(tmp_path: Path) -> None:
    plain = "\n".join(json.dumps(p, ensure_ascii=False) for p in PROMPTS)
    assert load_prompts(written(tmp_path / "p.jsonl", plain)) == PROMPTS
    rows = "\n".join(json.dumps({"text": p, "caption": p[::-1], "id": 3}) for p in PROMPTS)
    file = written(tmp_path / "p.jsonl", rows)
    assert load_prompts(file) == [p[::-1] for p in PROMPTS]  # caption comes before text
    assert load_prompts(f"{file}:text") == PROMPTS


def test_csv(tmp_path: Path) -> None:
    def quoted(p: str) -> str:
        return '"' + p.replace('"', '""') + '"'

    table = "id, prompt,other\n" + "\n".join(f"{i},{quoted(p)},x" for i, p in enumerate(PROMPTS))
    file = written(tmp_path / "p.csv", table)
    assert load_prompts(file) == PROMPTS
    assert load_prompts(f"{file}:other") == ["x"] * 4
    file = written(tmp_path / "q.csv", "prompt,id\r\none\u2028line,1\r\n")
    assert load_prompts(file) == ["one\u2028line"]


@pytest.mark.parametrize(
    ("name", "text", "column", "line"),
    [
        ("p.txt", "", "", "has no prompts: give at least one"),
        ("p.txt", "\n \n", "", "has no prompts"),
        ("p.txt", "a cat\n\na dog\n", "", "p.txt, line 2: it is empty; remove it"),
        ("p.txt", b"a cat\n\xff\xfe", "", "p.txt is not text in UTF-8"),
        ("p.txt", "a cat", ":text", "p.txt has no columns: give it without :text"),
        ("p.jsonl", "", "", "has no prompts"),
        ("p.jsonl", '"a"\n{', "", "p.jsonl, line 2: it is not JSON"),
        ("p.jsonl", '"a"\n3', "", "p.jsonl, line 2: the prompt is not text"),
        ("p.jsonl", '"a"\n" "', "", "p.jsonl, line 2: the prompt is empty"),
        ("p.jsonl", '{"a": "b"}', "", "line 1 has no column prompt or caption or text; it has a:"),
        ("p.csv", "", "", "p.csv has no column"),
        ("p.csv", "a,b\n1,2\n", "", "p.csv has no column prompt or caption or text; it has a, b"),
        ("p.csv", "a,b\n1,2\n", ":c", "p.csv has no column 'c'; it has a, b: name one as in"),
        ("p.csv", "prompt\n", "", "has no prompts"),
        ("p.csv", "id,prompt\n1,a\n2,\n", "", "p.csv, line 3: the prompt is empty"),
        ("p.csv", "id,prompt\n1,a\n2\n", "", "p.csv, line 3: the prompt is not text"),
    ],
)
def test_lists_that_cannot_be_used(
    tmp_path: Path, name: str, text: str | bytes, column: str, line: str
) -> None:
    file = written(tmp_path / name, text)
    with pytest.raises(InputError) as error:
        load_prompts(f"{file}{column}")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "none.txt", f"{tmp_path / 'none.csv'}:text", "none", "a/b/c"):
        with pytest.raises(InputError, match="there is no file of prompts"):
            load_prompts(source)
    with pytest.raises(InputError, match="is a folder: give a file of prompts"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("source", ["someone/captions", "someone/captions:text"])
def test_the_hub_needs_a_package_and_a_network(source: str) -> None:
    """Offline (conftest.py), so that one of the two is always missing."""
    there = importlib.util.find_spec("datasets") is not None
    line = "cannot read the data set someone/captions from the hub" if there else "pip install"
    with pytest.raises(InputError, match=line) as error:
        load_prompts(source)
    assert "someone/captions" in str(error.value) and "\n" not in str(error.value)
