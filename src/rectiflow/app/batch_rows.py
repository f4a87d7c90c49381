"""The table of ``rectiflow edit --batch``: its rows, each looked at before any work."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.app import edit_job, options, record
from rectiflow.app.outputs import MANIFEST
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.invert import Preset

LOG, TABLE = "results.jsonl", "results.csv"
"""Of the whole table, beside the folders of its rows."""
NEEDED = ("image", "from", "to")
COLUMNS = (*NEEDED, "negative", "mask", "seed", "preset", "num_images", "output")

Choose = Callable[[str | None, bool], tuple["Preset", list[str]]]


@dataclass(frozen=True)
class Row:
    """A line of the table, known to be sound."""

    line: int
    """In the file, the header being line 1."""
    name: str
    """Of its folder below the output folder."""
    job: edit_job.Job

    @property
    def source(self) -> str:
        """What rows that share an inversion agree in."""
        job = self.job
        given = [str(job.image), job.seed, job.source_prompt, options.whole(job.preset)]
        return json.dumps(given, default=str)

    def inputs(self, *model: str) -> str:
        """SHA-256 over all that its result follows from."""
        job = self.job
        given = {
            "model": model,
            "image": None if job.image is None else record.file_hash(job.image),
            "mask": None if job.mask is None else record.file_hash(job.mask),
            "seed": job.seed,
            "prompts": [job.source_prompt, *job.prompts],
            "negative": job.negative,
            "preset": options.whole(job.preset),
            "diagnose": job.diagnose,
            "num_images": job.num_images,
            "around": dataclasses.asdict(job.around),
        }
        return hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()

    def shown(self) -> dict[str, Any]:
        """What the results say of it whatever becomes of it."""
        job = self.job
        return {
            "row": self.line,
            "output": self.name,
            "image": None if job.image is None else str(job.image),
            "from": job.source_prompt,
            "to": job.prompts[0],
        }


def read_rows(
    table: Path,
    output: Path,
    choose: Choose,
    preset: str | None,
    diagnose: bool,
    drawn: edit_job.Around,
) -> list[Row]:
    """All rows of a table, each looked at.

    Args:
        table: a CSV file with a header; paths in it are relative to its folder.
        output: folder for the rows' folders.
        choose: the preset by name, of an inversion or not, and the fields set one by one, with the
            command's own settings.
        preset: its name for the rows that name none.
        diagnose: whether each is diagnosed.
        drawn: how their masks are read.

    Raises:
        InputError: names the first line that is wrong, and how.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = [(name or "").strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            # A quoted cell may go over lines, so lines are the reader's to count.
            lines = [(reader.line_num, cells) for cells in reader]
    except OSError as error:
        raise InputError(f"cannot read {table}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{table} is not a CSV file in UTF-8: {error}") from error
    unknown = [name for name in names if name not in COLUMNS]
    missing = [name for name in NEEDED if name not in names]
    if unknown or missing:
        what = f"has a column {unknown[0]!r}" if unknown else f"lacks the column {missing[0]}"
        raise InputError(f"{table} {what}: the first line should be among {','.join(COLUMNS)}")
    rows = []
    for number, (line, cells) in enumerate(lines, 1):
        try:
            row = _row(line, number, cells, table.parent, output, choose, preset, diagnose, drawn)
            rows.append(row)
        except InputError as error:
            raise InputError(f"{table}, line {line}: {in_columns(error)}") from error
    if not rows:
        raise InputError(f"{table} has no rows below its first line")
    counted = Counter(row.name.casefold() for row in rows)  # some disks do not tell A from a
    for row in rows:
        if counted[row.name.casefold()] > 1:
            raise InputError(
                f"{table}, line {row.line}: the output {row.name} is another row's too"
            )
    return rows


def _row(
    line: int,
    number: int,
    cells: dict[Any, Any],
    folder: Path,
    output: Path,
    choose: Choose,
    preset: str | None,
    diagnose: bool,
    drawn: edit_job.Around,
) -> Row:
    if None in cells or None in cells.values():
        raise InputError("it has not as many cells as the first line; quote cells with a comma")
    given = {name: text.strip() for name, text in cells.items() if text.strip()}
    if "to" not in given:
        raise InputError("to is empty: what should the image show instead?")
    name = given.get("output", f"{number:04d}")
    if Path(name).is_absolute() or ".." in Path(name).parts or Path(name) == Path():
        raise InputError(f"the output {name} is not a folder's name below -o")
    if Path(name).parts[0].casefold() in (LOG, TABLE, MANIFEST):
        raise InputError(f"the output {name} is the name of a file of the table's: give another")
    if options.is_picture(Path(name)):
        raise InputError(f"the output {name} is a picture's name: a row gets a folder")
    reused = Path(given.get("image", "")).suffix == ".safetensors"
    chosen, named = choose(given.get("preset", preset), reused)
    job = edit_job.Job(
        image=folder / Path(given["image"]).expanduser() if "image" in given else None,
        seed=_number("seed", given["seed"], 0) if "seed" in given else None,
        source_prompt=given.get("from"),
        prompts=[given["to"]],
        negative=given.get("negative"),
        mask=folder / Path(given["mask"]).expanduser() if "mask" in given else None,
        output=output / name,
        preset=chosen,
        preset_name=given.get("preset", preset),
        named=named,
        around=drawn if "mask" in given else edit_job.Around(),
        diagnose=diagnose,
        num_images=_number("num_images", given.get("num_images", "1"), 1),
    )
    edit_job.check(job)
    for file in (job.image, job.mask):
        if file is not None:
            _look(file)
    return Row(line, name, job)


def in_columns(error: Exception) -> str:
    """What is wrong, in the table's words."""
    text = str(error)
    for column, name in (("from", "source_prompt"), ("negative", "negative_prompt")):
        text = text.replace(name, column)
    return text


def _number(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= options.LARGEST_SEED:
        raise InputError(f"the {name} {text} is not a whole number from {least}")
    return int(text)


def _look(file: Path) -> None:
    """See that a file is there and begins like a picture; all of it is read when it is needed."""
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    if file.suffix == ".safetensors":
        return
    from rectiflow.models.picture import check_image

    check_image(file)
