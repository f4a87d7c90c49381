"""Lists of prompts from files, and what is said of those that are wrong."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "json", "jsonl", "ndjson"])
def test_one_list_in_every_format_with_blanks_skipped_and_counted(
    tmp_path: Path, kind: str, packed: bool
) -> None:
    rows = [*PROMPTS[:2], "", *PROMPTS[2:], "  ", "the last"]
    out = io.StringIO(newline="")
    match kind:
        case "txt":
            out.write("\n".join(rows))
        case "csv" | "tsv":
            table = csv.writer(out, delimiter="," if kind == "csv" else "\t")
            table.writerows([["caption", "id"], *([row, "7"] for row in rows)])
        case "json":
            json.dump(rows, out)
        case _:
            out.write(
                "\n".join(json.dumps({"prompt": row}) if row.strip() else row for row in rows)
            )
    data = out.getvalue().encode()
    file = tmp_path / f"p.{kind}{'.gz' if packed else ''}"
    written(file, gzip.compress(data) if packed else data)
    with pytest.warns(UserWarning, match=rf"p\.{kind}.*: 2 prompts are blank and skipped"):
        assert load_prompts(file) == [*PROMPTS, "the last"]
    with pytest.raises(InputError, match="the prompt is empty"):
        load_prompts(file, blanks=False)


def test_blank_lines_of_a_table_count_too(tmp_path: Path) -> None:
    file = written(tmp_path / "p.csv", 'prompt,id\n\na cat,1\n\n"",2\na dog,3\n\n')
    with pytest.warns(UserWarning, match="3 prompts are blank and skipped"):
        assert load_prompts(file) == ["a cat", "a dog"]


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        written(file, b"PAR1")
        with pytest.raises(InputError, match=r"needs the package datasets: .*\.\[datasets\]"):
            load_prompts(file)
        return
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["a cat", None, "a dog"]}), file)
    with pytest.warns(UserWarning, match="1 prompt is blank and skipped"):
        assert load_prompts(file) == ["a cat", "a dog"]
    with pytest.raises(InputError, match=r"p.parquet has no column 'c'; it has id, text"):
        load_prompts(f"{file}:c")
    written(file, b"PAR1")
    with pytest.raises(InputError, match="is not a Parquet file"):
        load_prompts(file)


@pytest.mark.parametrize(
    ("name", "text", "column", "line"),
    [
        ("p.txt", "", "", "has no prompts: give at least one"),
        ("p.txt", "\n \n", "", "has no prompts"),
        ("p.txt", b"a cat\n\xff\xfe", "", "p.txt, line 2: it is not text in UTF-8"),
        ("p.txt", "a cat".encode("utf-16"), "", "p.txt, line 1: it is not text in UTF-8"),
        ("p.xlsx", "a cat", "", "p.xlsx is not a list of prompts by its name: give .txt, .csv,"),
        ("p.txt.gz", "a cat", "", "p.txt.gz is not a whole gzip file"),
        (
            "p.txt.gz",
            gzip.compress(b"a cat", mtime=0)[:-9],
            "",
            "p.txt.gz is not a whole gzip file",
        ),
        ("p.parquet.gz", "a cat", "", "p.parquet.gz is not a list of prompts by its name"),
        ("p.json", '{"a": "b"}', "", "p.json is not a list of prompts: give"),
        ("p.json", "[" * 100_000, "", "p.json is nested more than 64 deep"),
        ("p.json", '["a", 3]', "", "p.json, entry 2: the prompt is not text"),
        ("p.json", '[{"a": "b", "c": "d"}]', "", "entry 1 has no column prompt or caption"),
        ("p.tsv", "a\tb\n1\t2\n", "", "p.tsv has no column prompt or caption or text; it has a, b"),
        ("p.txt", "a cat", ":text", "p.txt has no columns: give it without :text"),
        ("p.jsonl", "", "", "has no prompts"),
        ("p.jsonl", '"a"\n{', "", "p.jsonl, line 2 is not JSON"),
        ("p.jsonl", '"a"\n3', "", "p.jsonl, line 2: the prompt is not text"),
        ("p.jsonl", '{"a": "b", "c": 1}', "", "line 1 has no column prompt or caption or text; it"),
        ("p.csv", "", "", "p.csv has no column"),
        ("p.csv", "a,b\n1,2\n", "", "p.csv has no column prompt or caption or text; it has a, b"),
        ("p.csv", "a,b\n1,2\n", ":c", "p.csv has no column 'c'; it has a, b: name one as in"),
        ("p.csv", "prompt\n", "", "has no prompts"),
        ("p.csv", "a red cat\ntwo dogs\n", "", "p.csv has no column prompt or caption or text; it"),
        ("p.csv", "id,prompt\n1,a\n2\n", "", "p.csv, line 3: it ends before the column prompt"),
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
