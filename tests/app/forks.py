"""Commands as processes of their own, without the seconds that importing takes each of them.

One process (`serve`) imports everything, does nothing else, and forks for every command. The fork
has the caller's folder, environment, output and process group, so it can be killed, limited and
told its rank like any other process; it runs `cli.main` and exits with its code. `Forks.command`
is what a shell script calls in place of ``rectiflow``: a small program that asks for a fork and
waits for its end.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HEAVY = (
    "accelerate.utils",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "torch.distributed",
    "transformers.models.clip.modeling_clip",
    "rectiflow.app.cli",
    "rectiflow.models.sd",
    "rectiflow.models.stacked_unet",
    "rectiflow.straighten.api",
    "rectiflow.straighten.finished",
    "rectiflow.straighten.pair_maker",
)
"""What commands import."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Forks:
    """The process that forks, from its start to `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")  # its address must be short
        self.address = str(Path(self._folder.name) / "socket")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == b"ready\n"

    @property
    def command(self) -> str:
        """For a shell."""
        return f"{sys.executable} -I -S {__file__} run {self.address}"

    def start(
        self, *words: object, fsize: int | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command; `options` are those of `subprocess.Popen`.

        Args:
            *words: Of the command.
            fsize: No file that it writes can be larger, in bytes: a disk that is full.
            **options: Such as `cwd` and `env`.
        """
        limit = [] if fsize is None else ["--fsize", str(fsize)]
        command = [*self.command.split(), *limit, *map(str, words)]
        return subprocess.Popen(command, text=True, process_group=0, **options)

    def __call__(self, *words: object, **options: Any) -> Ended:
        """Run a command to its end."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.start(*words, **pipes, **options)
        out, err = process.communicate(timeout=300)
        return Ended(process.returncode, out, err)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # by which it knows, also if this process dies
        self.process.wait(timeout=60)
        self._folder.cleanup()


def told(words: list[str], ready: Callable[[], object], number: int, log: Path) -> int:
    """Run a command in a process of its own, and send it a signal when it is ready; its code."""
    from rectiflow.app import cli

    child = os.fork()
    if not child:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = cli.main(words)
                sys.stdout.flush()
                sys.stderr.flush()
        finally:
            os._exit(code)
    while not ready() and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(address: str, words: list[str]) -> int:
    """Ask for a fork in this process's place, and wait for its end."""
    limit = int(words[1]) if words[:1] == ["--fsize"] else None
    request = {
        "words": words if limit is None else words[2:],
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "group": os.getpgid(0),
        "fsize": limit,
    }
    with socket.socket(socket.AF_UNIX) as opened:
        opened.connect(address)
        socket.send_fds(opened, [b"!"], [1, 2])
        opened.sendall(json.dumps(request).encode() + b"\n")
        # The fork is now one of this group, if this process is still there to let it begin.
        if opened.recv(1) != b"?":
            return 137
        opened.sendall(b"!")
        answer = opened.makefile().readline()
    return int(answer) if answer else 137


def serve(address: str) -> None:
    """Fork for each request until standard input closes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(16)
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        for name in HEAVY:
            importlib.import_module(name)
        forked: set[int] = set()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            child = os.fork()
            if not child:
                listener.close()
                _command(connection)
            connection.close()
            forked.add(child)
            forked -= {child for child in forked if os.waitpid(child, os.WNOHANG)[0]}


def _command(connection: socket.socket) -> None:
    """What the fork does; it does not return."""
    import resource
    import traceback

    from rectiflow.app import cli

    code = 1
    try:
        _, outputs, *_ = socket.recv_fds(connection, 1, 2)
        request = json.loads(connection.makefile().readline())
        os.setpgid(0, request["group"])
        connection.sendall(b"?")
        if not connection.recv(1):
            os._exit(code)  # who asked was killed meanwhile
        for number, output in enumerate(outputs, 1):
            os.dup2(output, number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ |= request["environment"]
        if request["fsize"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["fsize"],) * 2)
        code = cli.main(request["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(b"%d\n" % code)
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(run(sys.argv[2], sys.argv[3:]))
