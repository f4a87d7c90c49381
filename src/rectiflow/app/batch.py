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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.app import edit_job, editing, options
from rectiflow.app.batch_rows import LOG, TABLE, Choose, Row, in_columns, read_rows
from rectiflow.app.console import Session, finite
from rectiflow.app.edit_job import Around
from rectiflow.app.outputs import Outputs, is_below, remove_all
from rectiflow.app.results import samples
from rectiflow.errors import InputError, WorkError
from rectiflow.files import write_csv, write_whole
from rectiflow.guarded import MOST_UNPACKED, Unreadable, parse_json, read_bytes

if TYPE_CHECKING:
    from rectiflow.invert import Inversion
    from rectiflow.models.base import FlowModel

SHOWN = ("row", "status", "output", "image", "from", "to", "nfe", "nfe_inversion", "nfe_editing",
         "nfe_reconstruction", "seconds", "psnr", "error")  # fmt: skip
"""The columns of results.csv."""
PARTS = ("inversion", "editing", "reconstruction")
"""What network samples are spent on."""


class Log:
    """What is done: one JSON object a line in results.jsonl, and the same as a table beside it."""

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}
        """The last entry of each output."""
        for entry in self._read():
            self.entries[entry["output"]] = entry
        file = folder / LOG  # grows, and says itself whose it is
        if not (overwrite or self.entries) and file.is_file() and file.stat().st_size:
            raise InputError(
                f"{file} is there, and holds no results of rectiflow: choose another folder with "
                "-o, or replace it with --overwrite"
            )

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

    def keep(self, rows: Sequence[Row]) -> list[str]:
        """Forget, and remove, what was made of rows that are no longer there; their names.

        A line that was cut off by a kill goes, and what is added begins on a line of its own.
        """
        dropped = sorted(self.entries.keys() - {row.name for row in rows})
        for name in dropped:
            del self.entries[name]
            remove_all(self.folder / name)
        write_whole(self.folder / LOG, "".join(_line(entry) for entry in self.entries.values()))
        return dropped

    def _read(self) -> Iterator[dict[str, Any]]:
        file = self.folder / LOG
        if not file.is_file():
            return
        for line in read_bytes(file, MOST_UNPACKED).splitlines():
            try:
                entry = parse_json(line, file)
            except Unreadable:
                continue
            ours = {"output", "inputs", "status"} <= entry.keys()
            if ours and isinstance(entry["output"], str) and is_below(entry["output"]):
                yield entry


def run_batch(
    table: Path,
    output: Path,
    choose: Choose,
    preset: str | None,
    chosen: options.ModelOptions,
    terminal: Session,
    diagnose: bool = False,
    drawn: Around | None = None,
    overwrite: bool = False,
) -> None:
    """Do the rows of a table that are not done yet, with one model.

    Args:
        table: the CSV file.
        output: folder for the results and the rows' folders.
        choose: as for `read_rows`.
        preset: as for `read_rows`.
        chosen: which model.
        terminal: for warnings and the result.
        diagnose: as `rectiflow.edit` takes it, of every row.
        drawn: how the masks are read.
        overwrite: whether files that are not ours may be replaced.

    Raises:
        InputError: the table is wrong; nothing was done.
        WorkError: some rows failed, the others are done.
    """
    from rectiflow.progress import progress

    started = time.perf_counter()
    rows = read_rows(table, output, choose, preset, diagnose, drawn or Around())
    tables = Outputs(output, (TABLE,), overwrite=overwrite, reads=(table,))
    log = Log(output, overwrite)
    model = chosen.load()
    inputs = {row.name: row.inputs(model.weight_hash, model.field_hash) for row in rows}
    outputs: dict[str, Outputs] = {}
    todo = [row for row in rows if not log.done(row, inputs[row.name])]
    for row in todo:
        try:
            _check(model, row.job)
            outputs[row.name] = row.job.outputs(overwrite)
        except InputError as error:
            raise InputError(f"{table}, line {row.line}: {in_columns(error)}") from error
    tables.file(TABLE)
    dropped = log.keep(rows)
    if dropped:
        terminal.note(
            f"{table} no longer has {', '.join(dropped)}: what was made of them is removed"
        )
    waiting = Counter(row.source for row in todo)
    kept: dict[str, Inversion] = {}
    spent: Counter[str] = Counter()
    for row in progress(todo, desc="edits", unit="edit", leave=False):
        entry = row.shown() | {"inputs": inputs[row.name]}
        shared = kept.get(row.source)
        waiting[row.source] -= 1
        try:
            kept[row.source], done = _edit(model, chosen, row, shared, terminal, outputs[row.name])
            entry |= done | {"status": "done"}
            spent.update(done["nfe"])
        except (InputError, WorkError, OSError) as error:
            entry |= {"status": "failed", "error": in_columns(error)}
            terminal.warn(f"line {row.line}: {in_columns(error)}")
        if not waiting[row.source]:
            kept.pop(row.source, None)  # a path at 1024 × 1024 is 32 MB
        log.add(entry)
    log.write_table()
    tables.finish()
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


def _check(model: FlowModel, job: edit_job.Job) -> None:
    """See that a row fits the model, before the first row is made."""
    from rectiflow.invert import Inversion
    from rectiflow.invert.features import check_controls
    from rectiflow.models.picture import load_image
    from rectiflow.steer.masks import read_mask
    from rectiflow.steer.source import check_reuse, source_place

    preset = options.preset_on(model, job.preset, job.preset_name, job.named)
    check_controls(model, preset, windows=False)
    source: Inversion | Any = None
    if job.reused:
        assert job.image is not None
        source = Inversion.load(job.image, model)
        replaced = {name: getattr(preset, name) for name in job.named}
        own = preset if job.preset_name else None
        check_reuse(source, model, job.source_prompt, replaced, own)
    elif job.image is not None and job.mask is not None:
        source = load_image(job.image)
    if job.mask is not None:
        size, drawn = source_place(model, source).source_size, job.around
        read_mask(job.mask, size, invert=drawn.mask_invert, resize=drawn.mask_resize)


def _edit(
    model: FlowModel,
    chosen: options.ModelOptions,
    row: Row,
    shared: Inversion | None,
    terminal: Session,
    outputs: Outputs,
) -> tuple[Inversion, dict[str, Any]]:
    """One row; its inversion for the next of the same source, and what results.jsonl says of it."""
    picture = edit_job.read(row.job)
    # The warnings of a row are its own, each printed once for the whole table.
    own = _Row(terminal.stdout, terminal.as_json, terminal)
    command = _command(chosen, row)
    result, data = editing.perform(model, row.job, picture, command, own, outputs, shared)
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


def _command(chosen: options.ModelOptions, row: Row) -> str:
    """What makes this row by itself, from the same folder."""
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
        ("-o", job.output),
    ):
        words += [] if value is None else [option, str(value)]
    words += chosen.words
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
