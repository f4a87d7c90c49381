"""One file of hashes for a folder: what was written is what is read, or the file is named.

`checksums.json` has the SHA-256 of every file that is read from the folder by its path. Model cards
may be edited and are not in it; files beside the folder's own, such as LoRAs, may be put there.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from rectiflow.files import write_whole
from rectiflow.guarded import Unreadable, parse_json, read_bytes

CHECKSUMS = "checksums.json"
_READ = (".json", ".safetensors", ".txt", ".model")
"""What libraries look for in a model's folder."""
_THREADS = 4


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` for the files that are in a folder now.

    Args:
        folder: Of a model or a checkpoint, finished.
    """
    files = sorted(file for file in folder.rglob("*") if _counts(file.relative_to(folder)))
    text = json.dumps(_hashes(folder, [file.relative_to(folder).as_posix() for file in files]))
    write_whole(folder / CHECKSUMS, text.replace(", ", ",\n ") + "\n")


def verify(folder: Path) -> bool:
    """Compare a folder with its `checksums.json`.

    Each file is read once, before anything else looks into it: about a second for a gigabyte and a
    half, and what is then loaded comes from the system's cache.

    Returns:
        Whether there is one; a folder from elsewhere has none.

    Raises:
        Unreadable: A file is missing or is not what was written, there is one too many, or the
            hashes themselves cannot be read.
    """
    try:
        expected = parse_json(read_bytes(folder / CHECKSUMS), folder / CHECKSUMS)
    except FileNotFoundError:
        return False
    for name, checksum in expected.items():
        path = PurePosixPath(name)
        inside = name and not path.is_absolute() and ".." not in path.parts and "\0" not in name
        if not inside or not isinstance(checksum, str):
            raise Unreadable(folder / CHECKSUMS, "is not a list of hashes")
        if not (folder / name).is_file():
            raise Unreadable(folder / name, "is missing")
    for name, found in _hashes(folder, list(expected)).items():
        if found != expected[name]:
            raise Unreadable(folder / name, "is not what was written")
    for name in sorted(_readable(folder, {PurePosixPath(name).parts[0] for name in expected})):
        if name not in expected and name != CHECKSUMS:
            raise Unreadable(folder / name, f"is not one of the files that {CHECKSUMS} lists")
    return True


def _counts(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix in _READ and not hidden and path.name != CHECKSUMS


def _readable(folder: Path, known: set[str]) -> set[str]:
    """What a library might take for a part: JSON beside them, and all in their folders."""
    found = {file.name for file in folder.glob("*.json") if not file.name.startswith(".")}
    for part in known:
        inside = (file for file in (folder / part).glob("*") if file.suffix in _READ)
        found |= {file.relative_to(folder).as_posix() for file in inside}
    return found


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as threads:  # hashing leaves the interpreter to others
        return dict(zip(names, threads.map(lambda name: _hash(folder / name), names), strict=True))


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
