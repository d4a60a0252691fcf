"""The `fdm` command for tests: real processes, which start in milliseconds.

Importing torch takes seconds, and the tests start hundreds of commands. So most are forks of one process that has
imported everything and done nothing else: with their own arguments, folder, environment, output, signals and exit code.
What depends on the start of an interpreter, or on limits of the process that starts it, is for `anew`.

    python -m tests.command          is that process; it takes requests, JSON, a line each
"""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TextIO

from fdm_cli.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
NOISY = ("FORCE_COLOR", "GITHUB_ACTIONS")


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: this process's, one thread, 100 columns."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOISY}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100", **changes}


def anew(*arguments: object, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in an interpreter of its own."""
    command = [sys.executable, "-m", "fdm_cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**changes), capture_output=True, encoding="utf-8", timeout=300, check=False
    )


class Command:
    """A running `fdm`, with what `subprocess.Popen` has of use here; `stdout` and `stderr` are read as they grow."""

    def __init__(self, *arguments: object, cwd: Path | None = None, **changes: str) -> None:
        self.returncode: int | None = None
        self.stdout, self.stderr = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))  # noqa: SIM115
        self.pid = _ask(
            arguments=list(map(str, arguments)),
            cwd=str(cwd or Path.cwd()),
            env=environment(**changes),
            outputs=[f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (self.stdout, self.stderr)],
        )

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask(poll=self.pid)
            if self.returncode is not None:
                self.stdout, self.stderr = map(_rest_of, (self.stdout, self.stderr))
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code, as soon as there is one; a command that takes longer is killed."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(f"fdm (process {self.pid})", timeout)
            time.sleep(0.003)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """All of stdout and stderr that has not been read, when it has ended."""
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _rest_of(file: TextIO) -> TextIO:
    with file:
        return StringIO(file.read())


@cache
def _server() -> subprocess.Popen[str]:
    """It ends when its stdin is closed: at the latest with this process."""
    command = [sys.executable, "-m", "tests.command"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def close() -> None:
    """Ends the process that is forked."""
    if _server.cache_info().currsize:
        with _server():
            pass
        _server.cache_clear()


def _ask(**request: object):
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _import_everything() -> None:
    """The package, and what torch imports late: for an optimizer, and for tensors without content."""
    ours = [f"fdm_cli.{file.stem}" for file in (ROOT / "fdm_cli").glob("*.py")]
    for name in (*ours, "fdm_cli.cli.main", "torch._dynamo", "torch.distributed.tensor"):
        import_module(name)


def _serve() -> None:
    _import_everything()
    gc.freeze()
    running = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = running[request["poll"]].exitcode
        else:
            process = multiprocessing.get_context("fork").Process(target=_become, kwargs=request)
            process.start()
            answer = process.pid
            running[answer] = process
        print(json.dumps(answer), flush=True)
    for process in running.values():  # of a test that has failed; it would be waited for
        if process.is_alive():
            process.kill()


def _become(arguments: list[str], cwd: str, env: dict[str, str], outputs: list[str]) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["fdm", *arguments]
    main()


if __name__ == "__main__":
    _serve()
