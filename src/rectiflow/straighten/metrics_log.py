"""What a run reports: a line of JSON per look at it, TensorBoard's files beside them, trackers.

The first two belong to a step. A run that is resumed from a checkpoint forgets what was reported
after it, so that the reports of a run that was killed are those of one that was not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rectiflow.errors import InputError, install
from rectiflow.files import replacing
from rectiflow.guarded import MOST_UNPACKED, Unreadable, parse_json, read_bytes
from rectiflow.straighten.trackers import check_tracker, open_tracker

TRACKERS = ("wandb", "trackio")
"""Of accelerate, in `report_to`."""


def check_reporters(report_to: Sequence[str]) -> None:
    """Raise InputError if a reporter lacks its package."""
    if "tensorboard" in report_to:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise InputError(
                "report_to tensorboard needs the package tensorboard: "
                f"{install('tensorboard')}, or set report_to to [jsonl]"
            ) from None
    for name in set(TRACKERS) & set(report_to):
        check_tracker(name)


class MetricsLog:
    """The open reports of one sitting, which begins after `step`; -1 for a run from nothing."""

    def __init__(
        self,
        run: Path,
        report_to: Sequence[str],
        step: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._file: Any = None
        self._trackers: list[Any] = []
        self._board: Any = None
        path = run / "log.jsonl"
        if "jsonl" in report_to:
            forget_after(path, step)
            self._file = path.open("a", encoding="utf-8")
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            # Readers drop what earlier files say of the steps from here on.
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        for name in TRACKERS:
            if name in report_to:
                self._trackers.append(open_tracker(name, run, settings or {}))

    def write(self, record: Mapping[str, Any]) -> None:
        """Report a record that holds `step`; numbers that are not finite become null."""
        record = {name: _finite(value) for name, value in record.items()}
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        figures = _figures(record)
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, record["step"])
        for tracker in self._trackers:
            tracker.log(figures, step=record["step"])

    def picture(self, file: Path, step: int) -> None:
        """Show a picture on TensorBoard, and by a tracker that shows pictures."""
        # Of accelerate's trackers some do, and have a method of this name.
        trackers = [one for one in self._trackers if hasattr(one, "log_images")]
        if not (self._board or trackers) or not file.is_file() or not file.stat().st_size:
            return
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        if self._board is not None:
            self._board.add_image("samples", pixels, step, dataformats="HWC")
        for tracker in trackers:
            tracker.log_images({"samples": [pixels]}, step=step)

    def flush(self) -> None:
        """Wait until everything reported is on the disk: a checkpoint is about to rely on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files and trackers."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        for tracker in self._trackers:
            tracker.finish()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole; none if there is no log."""
    lines = read_bytes(path, MOST_UNPACKED).splitlines() if path.is_file() else []
    found = []
    for line in lines:
        with suppress(Unreadable):  # cut short by a kill
            found.append(parse_json(line, path))
    return found


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a log that are later than a step, and one that was cut short."""
    if not path.exists():
        return
    before = read_bytes(path, MOST_UNPACKED)
    lines = before.splitlines(keepends=True)
    after = b"".join(line for line in lines if _step(line) <= step)
    if after == before:
        return
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record that are known, by names such as `train/loss` and `measures/x`."""
    found: dict[str, float | None] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": figure for inner, figure in value.items()}
        elif name not in ("step", "time", "samples"):
            found[f"train/{name}"] = value
    return {name: figure for name, figure in found.items() if figure is not None}


def _step(line: bytes) -> float:
    """The step of a line; infinity for one that is not whole."""
    try:
        return int(parse_json(line, "log")["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
