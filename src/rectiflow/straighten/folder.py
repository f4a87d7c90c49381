"""A folder at any fsspec address whose files are whole or not there at all.

A file is written under a temporary name, read back, compared, and only then renamed. Locally the
rename is `os.replace`, which no kill can cut in two; object stores show an object when all of it
has arrived. Source of the addresses: https://filesystem-spec.readthedocs.io.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rectiflow.errors import InputError, WorkError

TEMPORARY = ".tmp-"
"""What the names of unfinished files begin with; readers pass over them."""
_ATTEMPTS = 3
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Folder:
    """Files by name at an address.

    Args:
        uri: A path, or an address such as `s3://bucket/pairs`, `gs://…`, `hf://…`, `memory://…`.

    Raises:
        InputError: fsspec does not know the protocol, or lacks the package for it.
    """

    def __init__(self, uri: str | Path) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.uri = str(uri).rstrip("/") or "/"
        try:
            # The listings that some file systems keep do not see what other writers do.
            self.fs, self.root = url_to_fs(os.path.expanduser(self.uri), use_listings_cache=False)
        except ValueError as error:
            raise InputError(
                f"{self.uri}: {error}: give a folder, or an address that fsspec knows, such as "
                "s3://, gs:// or hf://"
            ) from error
        except ImportError as error:
            raise InputError(f"{self.uri}: {error}") from error
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Where a file is, for `fs`."""
        return f"{self.root.rstrip('/')}/{name}"

    def names(self) -> set[str]:
        """The names of all that is in it, temporary files included; none if it is not there.

        Raises:
            InputError: It is a file, or cannot be read.
        """
        self.fs.invalidate_cache()
        try:
            # A device, say, is neither a file nor a folder, and lists itself.
            no_folder = self.local and not self.fs.isdir(self.root) and self.fs.exists(self.root)
            if no_folder or self.fs.isfile(self.root):
                raise InputError(f"{self.uri} is a file: give a folder")
            found = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise InputError(f"cannot read {self.uri} ({reason(error)})") from error
        return {str(path).rstrip("/").rpartition("/")[2] for path in found} - {""}

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None if it is not there.

        Raises:
            WorkError: It is there and cannot be read.
        """
        try:
            data: bytes = self.fs.cat_file(self.path(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WorkError(f"cannot read {self.uri}/{name} ({reason(error)})") from error
        return data

    def check_writable(self) -> None:
        """Make the folder, and see that files can be written to it.

        Raises:
            InputError: They cannot.
        """
        name = _temporary("probe")
        try:
            self.fs.makedirs(self.root, exist_ok=True)
            self._put(self.path(name), b"rectiflow")
        except OSError as error:
            raise InputError(
                f"cannot write to {self.uri} ({reason(error)}): choose another address, or make it "
                "writable"
            ) from error
        finally:
            self.remove([name])

    def write(self, name: str, data: bytes, *, new: bool = False) -> None:
        """Make a file with exactly these bytes, replacing any of that name.

        Args:
            name: Of the file.
            data: All of it.
            new: Leave a file of that name as it is, whatever is in it.

        Raises:
            WorkError: The bytes did not arrive; what was there before is untouched.
        """
        for attempt in range(_ATTEMPTS):
            temporary = _temporary(name)
            try:
                self._put(self.path(temporary), data)
                if self.fs.cat_file(self.path(temporary)) != data:
                    raise WorkError(
                        f"{self.uri}/{name} reads back differently from what was written"
                    )
                self._rename(temporary, name, new)
                return
            except FileNotFoundError as error:
                # Another writer of the same file has tidied up: begin again.
                if attempt == _ATTEMPTS - 1:
                    raise WorkError(f"cannot write {self.uri}/{name} ({reason(error)})") from error
            except OSError as error:
                remedy = ""
                if error.errno in _FULL:
                    remedy = ": make room, and the same command goes on from here"
                raise WorkError(
                    f"cannot write {self.uri}/{name} ({reason(error)}){remedy}"
                ) from error
            finally:
                self.remove([temporary])

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that may be there; one that cannot be removed now is left."""
        for name in names:
            with contextlib.suppress(OSError):
                if self.local:
                    os.unlink(self.path(name))
                else:
                    self.fs.rm_file(self.path(name))

    def temporaries(self, names: Iterable[str], of: Iterable[str]) -> list[str]:
        """Those of `names` that are unfinished files of `of`."""
        beginnings = tuple(f"{TEMPORARY}{name}-" for name in of)
        return [name for name in names if name.startswith(beginnings)]

    def _put(self, path: str, data: bytes) -> None:
        if not self.local:
            self.fs.pipe_file(path, data)
            return
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _rename(self, temporary: str, name: str, new: bool) -> None:
        source, target = self.path(temporary), self.path(name)
        if not self.local:
            if not (new and self.fs.exists(target)):
                self.fs.mv(source, target)
            return
        if not new:
            os.replace(source, target)
            return
        try:
            os.link(source, target)  # the one way of taking a name only if it is free
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise
            if not os.path.exists(target):  # a file system without links
                os.replace(source, target)


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def reason(error: BaseException) -> str:
    """An error's cause in words, without its path: `No space left on device`."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def dump_json(data: Any) -> bytes:
    """Data as JSON, the same bytes for the same data."""
    import json

    return (json.dumps(data, indent=1, ensure_ascii=False, sort_keys=False) + "\n").encode()


def _temporary(name: str) -> str:
    """A name for an unfinished file that no other writer, on any machine, has."""
    return f"{TEMPORARY}{name}-{os.getpid()}-{secrets.token_hex(6)}"
