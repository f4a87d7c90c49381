"""Where a command's files go: what we did not write is never touched, what we wrote goes as a set.

What is ours is written down in `.rectiflow.json`, in the folder the files are in: the files of
every command as a set, each with its SHA-256. A file that is not there, or has another hash, is
somebody's: it is refused unless ``--overwrite`` insists. Once a command is done, those files of
earlier sets go that it has replaced in part, and that nobody has changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from rectiflow.app import options, record
from rectiflow.errors import InputError
from rectiflow.files import leftovers, write_whole
from rectiflow.guarded import read_json

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

MANIFEST = ".rectiflow.json"
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Also replace files that rectiflow did not write."),
]
Files = dict[str, str | None]
"""The SHA-256 of each file by its name; None of one that may not be whole."""


class Outputs:
    """The files that one command writes into a folder.

    Args:
        folder: theirs; it is made.
        names: of the files, or patterns of names: what is known before any work.
        overwrite: whether also what is not ours may be replaced.
        reads: files that the command reads, and that must be there afterwards.
        number: nothing is replaced: where there is one of the files, all get an ending such as
            ``-run2``. It means nothing with `overwrite`.

    Raises:
        InputError: the folder cannot be written to, or a file is there that is not ours.
    """

    def __init__(
        self,
        folder: Path,
        names: Iterable[str],
        *,
        overwrite: bool = False,
        reads: Iterable[Path | None] = (),
        number: bool = False,
    ) -> None:
        self.folder, self.overwrite = folder, overwrite
        self.written: list[str] = []
        self.ending = ""
        names = list(names)
        options.output_folder(folder)
        if number and not overwrite:
            run = 1
            while any(os.path.lexists(folder / self._named(name)) for name in names):
                run += 1
                self.ending = f"-run{run}"
            return
        known = _read(folder)
        going = {name for files in known if _matching(files, names) for name in files}
        for file in reads:
            if file is not None and self._name(file) in {*going, *names}:
                raise InputError(f"{file} would be overwritten: choose another place with -o")
        if overwrite:
            return
        for name in names:
            there = sorted(folder.glob(name)) if "*" in name else [folder / name]
            for file in there:
                if "*" not in name or not (file.is_dir() or file.name == MANIFEST):
                    self._check(file, known)

    def file(self, name: str) -> Path:
        """Where to write a file of this name, now.

        Raises:
            InputError: there is one that is not ours.
        """
        name = self._named(name)
        file = self.folder / name
        with _changing(self.folder) as known:
            if not self.overwrite and name not in self.written:
                self._check(file, known)
            if name not in self.written:
                self.written.append(name)
            self._set(known)[name] = None  # for whoever comes after a kill
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def finish(self, *, whole: bool = True) -> None:
        """Note what was written, and remove what is left of the sets it replaces.

        Args:
            whole: False where the rest of a set is to stay, beside the part of it that is new.
        """
        if not self.written:
            return
        with _changing(self.folder) as known:
            mine = self._set(known)
            if whole:
                remove(self.folder, {n: h for n, h in mine.items() if n not in self.written})
                mine.clear()
            for name in self.written:
                if (self.folder / name).is_file():
                    mine[name] = record.file_hash(self.folder / name)

    def _named(self, name: str) -> str:
        return Path(name).with_stem(Path(name).stem + self.ending).as_posix()

    def _set(self, known: list[Files]) -> Files:
        """What is written now and all that it replaces, as one set."""
        found = [files for files in known if any(name in files for name in self.written)]
        for files in found:
            known.remove(files)
        known.append({name: digest for files in found for name, digest in files.items()})
        return known[-1]

    def _check(self, file: Path, known: list[Files]) -> None:
        if os.path.lexists(file) and not _ours(file, known, self.folder):
            raise InputError(
                f"{file} is there, and not as rectiflow has written it, if it has: choose another "
                "place, or give --overwrite"
            )

    def _name(self, file: Path) -> str | None:
        folder, file = self.folder.resolve(), file.resolve()
        return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else None


def beside(file: Path, *more: Path, overwrite: bool, reads: Iterable[Path | None] = ()) -> Outputs:
    """The outputs of a command that writes one file, and maybe more in its folder."""
    names = [one.name for one in (file, *more)]
    return Outputs(file.parent, names, overwrite=overwrite, reads=reads)


def remove(folder: Path, files: Files) -> None:
    """Remove files that nobody has changed, and folders that are empty then."""
    for name, digest in files.items():
        file = folder / name
        for left in leftovers(file):
            left.unlink(missing_ok=True)
        if file.is_file() and not file.is_symlink() and digest in (None, record.file_hash(file)):
            file.unlink()
        for parent in file.parents:
            if parent == folder or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()


def remove_all(folder: Path) -> None:
    """Remove what we wrote into a folder and nobody has changed; the folder too, if empty then."""
    if not folder.is_dir():
        return
    for files in _read(folder):
        remove(folder, files)
    (folder / MANIFEST).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _matching(files: Files, names: Iterable[str]) -> bool:
    patterns = list(names)
    return any(fnmatchcase(file, pattern) for file in files for pattern in patterns)


def _ours(file: Path, known: list[Files], folder: Path) -> bool:
    name = file.relative_to(folder).as_posix()
    found = [files[name] for files in known if name in files]
    if not found or file.is_symlink() or not file.is_file():
        return False
    return None in found or record.file_hash(file) in found


def _read(folder: Path) -> list[Files]:
    """The sets of files that we wrote; a list that is damaged says of nothing that it is ours."""
    try:
        said: Any = read_json(folder / MANIFEST)
        sets = [
            {str(n): None if h is None else str(h) for n, h in files.items() if is_below(n)}
            for files in said["sets"]
        ]
    except (InputError, KeyError, TypeError, AttributeError):
        return []
    return sets


def is_below(name: str) -> bool:
    """Whether a name stays below its folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


@contextmanager
def _changing(folder: Path) -> Iterator[list[Files]]:
    """The sets, to be changed; of several commands in one folder, one after the other."""
    with _locked(folder):
        known = _read(folder)
        yield known
        there = [files for files in known if files]
        write_whole(folder / MANIFEST, json.dumps({"sets": there}, indent=1) + "\n", shared=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for others that change the list; where locks are unknown there is none."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
