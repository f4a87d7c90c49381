"""``rectiflow edit --batch``: a table of edits, each row once, whatever happens in between.

Every row is validated before any work. What is done is written down row by row in results.jsonl,
with a hash of all that went into it; the same command again skips rows whose hash is there, so that
a run that was killed goes on where it stopped, and a row that was changed is done again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.app import edit_job, editing, options
from rectiflow.app.batch_rows import Choose, Row, read_rows
from rectiflow.app.console import Session, finite
from rectiflow.app.edit_job import Around
from rectiflow.app.results import samples
from rectiflow.errors import InputError, WorkError
from rectiflow.files import write_csv, write_whole
from rectiflow.guarded import MOST_UNPACKED, Unreadable, parse_json, read_bytes

if TYPE_CHECKING:
    from rectiflow.invert import Inversion
    from rectiflow.models.base import FlowModel

LOG, TABLE = "results.jsonl", "results.csv"
SHOWN = ("row", "status", "output", "image", "from", "to", "nfe", "nfe_inversion", "nfe_editing",
         "nfe_reconstruction", "seconds", "psnr", "error")  # fmt: skip
"""The columns of results.csv."""
PARTS = ("inversion", "editing", "reconstruction")
"""What network samples are spent on."""


class Log:
    """What is done: one JSON object a line in results.jsonl, and the same as a table beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}
        """The last entry of each output."""
        for entry in self._read():
            self.entries[entry["output"]] = entry
        # A line that was cut off by a kill goes, and what is added begins on a line of its own.
        write_whole(self.folder / LOG, "".join(_line(entry) for entry in self.entries.values()))

    def done(self, row: Row, inputs: str) -> bool:
        """Whether a row's result is there and made from the same inputs."""
        entry = self.entries.get(row.name, {})
        same = entry.get("status") == "done" and entry.get("inputs") == inputs
        return same and (row.job.output / "report.html").is_file()

    def add(self, entry: dict[str, Any]) -> None:
        """Write down an entry so that it survives whatever comes next."""
        self.entries[entry["output"]] = entry
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.write_table()

    def write_table(self) -> None:
        """Write results.csv anew."""
        rows = [_flat(entry) for entry in self.entries.values()]
        write_csv(self.folder / TABLE, rows, SHOWN)

    def _read(self) -> Iterator[dict[str, Any]]:
        file = self.folder / LOG
        if not file.is_file():
            return
        for line in read_bytes(file, MOST_UNPACKED).splitlines():
            try:
                entry = parse_json(line, file)
            except Unreadable:
                continue
            if isinstance(entry.get("output"), str):
                yield entry


def run_batch(
    table: Path,
    output: Path,
    choose: Choose,
    preset: str | None,
    load: Callable[[], FlowModel],
    terminal: Session,
    diagnose: bool = False,
    drawn: Around | None = None,
) -> None:
    """Do the rows of a table that are not done yet, with one model.

    Args:
        table: the CSV file.
        output: folder for the results and the rows' folders.
        choose: as for `read_rows`.
        preset: as for `read_rows`.
        load: gives the model.
        terminal: for warnings and the result.
        diagnose: as `rectiflow.edit` takes it, of every row.
        drawn: how the masks are read.

    Raises:
        InputError: the table is wrong; nothing was done.
        WorkError: some rows failed, the others are done.
    """
    from rectiflow.progress import progress

    started = time.perf_counter()
    rows = read_rows(table, output, choose, preset, diagnose, drawn or Around())
    options.output_folder(output)
    model = load()
    log = Log(output)
    inputs = {row.name: row.inputs(model.weight_hash, model.field_hash) for row in rows}
    todo = [row for row in rows if not log.done(row, inputs[row.name])]
    waiting = Counter(row.source for row in todo)
    kept: dict[str, Inversion] = {}
    spent: Counter[str] = Counter()
    for row in progress(todo, desc="edits", unit="edit", leave=False):
        entry = row.shown() | {"inputs": inputs[row.name]}
        shared = kept.get(row.source)
        waiting[row.source] -= 1
        try:
            kept[row.source], done = _edit(model, row, shared, terminal)
            entry |= done | {"status": "done"}
            spent.update(done["nfe"])
        except (InputError, WorkError, OSError) as error:
            entry |= {"status": "failed", "error": str(error)}
            terminal.warn(f"line {row.line}: {error}")
        if not waiting[row.source]:
            kept.pop(row.source, None)  # a path at 1024 × 1024 is 32 MB
        log.add(entry)
    log.write_table()
    entries = [log.entries[row.name] for row in rows]
    failed = [entry for entry in entries if entry["status"] == "failed"]
    data = {
        "batch": str(table),
        "model": model.name,
        "rows": entries,
        "done": len(todo) - len(failed),
        "skipped": len(rows) - len(todo),
        "failed": len(failed),
        "nfe": {part: spent[part] for part in (*PARTS, "total")},
        "seconds": time.perf_counter() - started,
        "results": LOG,
        "warnings": terminal.warnings,
    }
    terminal.result(data, _summary(data, output))
    if failed:
        named = "; ".join(f"line {entry['row']}: {entry['error']}" for entry in failed)
        raise WorkError(f"{len(failed)} of {len(rows)} rows failed ({named}): the rest is done")


def _edit(
    model: FlowModel,
    row: Row,
    shared: Inversion | None,
    terminal: Session,
) -> tuple[Inversion, dict[str, Any]]:
    """One row; its inversion for the next of the same source, and what results.jsonl says of it."""
    picture = edit_job.read(row.job)
    options.output_folder(row.job.output)
    # The warnings of a row are its own, each printed once for the whole table.
    own = _Row(terminal.stdout, terminal.as_json, terminal)
    result, data = editing.perform(model, row.job, picture, _command(model, row), own, shared)
    return result.inversion, {
        "edited": f"{row.name}/{data['edits'][0]['image']}",
        "variants": [f"{row.name}/{edit['image']}" for edit in data["edits"][1:]],
        "report": f"{row.name}/{data['report']}",
        "shared_inversion": shared is not None,
        "nfe": data["nfe"],
        "seconds": data["seconds"],
        **({"psnr": data["reconstruction"]["psnr"]} if row.job.diagnose else {}),
        "warnings": own.warnings,
    }


class _Row(Session):
    """The terminal of one row: what it warns of is its own and goes to the table's as well."""

    def __init__(self, stdout: Any, as_json: bool, table: Session) -> None:
        super().__init__(stdout, as_json)
        self.table = table

    def warn(self, text: str) -> None:
        """Keep a warning, and print it if no other row has."""
        self.warnings.append(text)
        self.table.warn(text)

    def note(self, text: str, once: str | None = None) -> None:
        """What is said once is so for the whole table."""
        self.table.note(text, once)


def _command(model: FlowModel, row: Row) -> str:
    """What makes this row by itself."""
    job = row.job
    words = ["rectiflow", "edit"]
    words += [] if job.image is None else [str(job.image)]
    for option, value in (
        ("--seed", job.seed),
        ("--from", job.source_prompt),
        ("--to", job.prompts[0]),
        ("--negative", job.negative),
        ("--mask", job.mask),
        ("--preset", job.preset_name),
        ("--model", None if model.name == options.DEFAULT_MODEL else model.name),
        ("-o", job.output),
    ):
        words += [] if value is None else [option, str(value)]
    given = {"--diagnose": job.diagnose, "--mask-invert": job.around.mask_invert}
    given |= {"--mask-resize": job.around.mask_resize}
    words += [option for option, value in given.items() if value]
    words += ["-n", str(job.num_images)] if job.num_images > 1 else []
    whole = dataclasses.asdict(job.preset)
    for name in job.named:
        words += ["--set", f"{name}={json.dumps(whole[name])}"]
    return shlex.join(words)


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as a row of results.csv."""
    nfe = entry.get("nfe")
    nfe = nfe if isinstance(nfe, dict) else {}
    spent = {"nfe": nfe.get("total")} | {f"nfe_{part}": nfe.get(part) for part in PARTS}
    return {name: entry.get(name) for name in SHOWN} | spent


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(finite(entry), ensure_ascii=False, allow_nan=False) + "\n"


def _summary(data: dict[str, Any], output: Path) -> str:
    lines = [
        f"{output / entry['output']}: {entry['to']}"
        for entry in data["rows"]
        if entry["status"] == "done"
    ]
    counts = f"{data['done']} done, {data['skipped']} done before, {data['failed']} failed"
    lines.append(f"{counts}; {samples(data['nfe'])} in {data['seconds']:.1f} s")
    lines.append(f"results: {output / TABLE}")
    return "\n".join(lines)
