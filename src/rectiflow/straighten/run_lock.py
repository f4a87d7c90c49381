"""One job at a time in a run's folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rectiflow.errors import InputError

try:
    import fcntl
except ImportError:  # not a Unix: two jobs are not noticed
    fcntl = None  # type: ignore[assignment]

NAME = ".running"


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold a run's folder; of the processes of one job the first does so for all.

    The lock is `flock`'s: the kernel gives it back when the process ends, however it ends, and NFS
    and most cluster file systems pass it on to other machines. Where a file system knows no locks
    there is none.

    Raises:
        InputError: another job is at work in the folder.
    """
    file = None if fcntl is None else _locked(run / NAME)
    try:
        yield
    finally:
        if file is not None:
            (run / NAME).unlink(missing_ok=True)
            os.close(file)


def _locked(path: Path) -> int | None:
    """The open file, locked; None where locks are unknown."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            whose = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            raise InputError(
                f"another job is at work in {path.parent} ({whose or 'it has just begun'}): wait "
                "for it or stop it, or choose another folder with -o"
            ) from None
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            return None
        # Whoever held it may have removed it meanwhile: a lock on a file without a name is none.
        try:
            if os.path.samestat(os.fstat(file), os.stat(path)):
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} of {socket.gethostname()}\n".encode())
                return file
        except FileNotFoundError:
            pass
        os.close(file)
