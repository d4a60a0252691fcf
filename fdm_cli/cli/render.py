"""What a command shows: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol, TextIO, cast

from fdm_cli.errors import Silenced, printable

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_INTERVAL = 15.0  # seconds between progress lines where there is no terminal


class Progress(Protocol):
    """A bar, or a line now and then."""

    def update(self, done: int, remark: str = "", speed: str = "", part: tuple[int, int] = (0, 0)) -> None:
        """`done` units are finished by now.

        Args:
            done: all of them, from the beginning.
            remark: is shown beside.
            speed: in other words than units a second.
            part: finished steps, and all steps, of what is being done now; a level of its own.
        """

    def skip(self, done: int) -> None:
        """`done` units were finished before: they say nothing about the speed."""


@dataclass(frozen=True)
class Output:
    """Where a command's words go.

    Attributes:
        as_json: the result is one JSON object on stdout; nothing else goes there.
        quiet: no remarks and no progress on stderr.
        mute: nothing at all; for all but one of several processes.
    """

    as_json: bool = False
    quiet: bool = False
    mute: bool = False

    def note(self, text: str) -> None:
        """A remark for a person, on stderr."""
        if not (self.quiet or self.mute):
            _say(printable(text))

    def warn(self, text: str) -> None:
        """Something the user should know even when remarks are off."""
        if not self.mute:
            _say(f"warning: {printable(text)}")

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """The command's result: `data` as JSON, or `text` for a person."""
        self._print(json.dumps(data) if self.as_json else text)

    def show(self, text: str) -> None:
        """A part of the result, for a person; with JSON on stdout a remark."""
        if self.as_json:
            self.note(text)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        if self.mute:
            return
        try:
            try:
                print(text, flush=True)
            except UnicodeEncodeError:  # e.g. a file's name that is no text at all
                encoding = sys.stdout.encoding
                print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except BrokenPipeError:  # the reader went away (`| head`); left to itself, the command line would exit with 1
            raise Silenced(0) from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, "stdout") from None

    @contextmanager
    def progress(self, total: int, unit: str, done: int = 0, steps: str = "") -> Iterator[Progress]:
        """Shows progress on stderr while the block runs: a bar on a terminal, else plain lines at a slow pace.

        Args:
            total: all units.
            unit: what they are called.
            done: finished before.
            steps: what the parts of a unit are called, if they are shown: a second bar.
        """
        if self.quiet or self.mute:
            yield _Silence()
        elif (console := _console_for_bars()) is not None:
            with _bar(console, total, unit, done, steps) as bar:
                yield bar
        else:
            yield _Lines(total, unit, done)


def _say(text: str) -> None:
    """On stderr. Its reader may be gone, or the disk full that it goes to: that must not end what is being made."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class _Lasting:
    """A stream for rich, which does not expect that a terminal goes away: see `_say`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.isatty = stream.isatty
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class _Silence:
    def update(self, done: int, remark: str = "", speed: str = "", part: tuple[int, int] = (0, 0)) -> None:
        pass

    def skip(self, done: int) -> None:
        pass


class _Lines:
    def __init__(self, total: int, unit: str, done: int) -> None:
        self._total, self._unit, self._start = total, unit, done
        self._began = self._shown = time.monotonic()

    def skip(self, done: int) -> None:
        self._start, self._began = done, time.monotonic()

    def update(self, done: int, remark: str = "", speed: str = "", part: tuple[int, int] = (0, 0)) -> None:
        now = time.monotonic()
        if now - self._shown < PLAIN_INTERVAL:
            return
        self._shown = now
        rate = (done - self._start) / max(now - self._began, 1e-9)
        left = (self._total - done) / rate if rate else float("inf")
        steps = f"step {part[0]}/{part[1]}" if part[1] else ""
        words = [f"{done}/{self._total} {self._unit}", remark, steps, speed or f"{rate:.3g} {self._unit}/s"]
        _say("  ".join([*filter(None, words), f"{duration(left)} left"]))


def _console_for_bars() -> Console | None:
    """Where stderr is a terminal on which rich draws anything; it is loaded only for terminals."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(file=cast(IO[str], _Lasting(sys.stderr)))
    return console if console.is_terminal and not console.is_dumb_terminal else None


@contextmanager
def _bar(console: Console, total: int, unit: str, done: int, steps: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[remark]}", markup=False),
        TimeRemainingColumn(),
    )
    # stdout carries results only: rich must not catch it.
    with RichProgress(*columns, console=console, redirect_stdout=False, transient=True) as progress:
        task = progress.add_task(unit, total=total, completed=done, remark="")
        inner = progress.add_task(steps, total=None, remark="", visible=bool(steps))

        class Bar:
            start, began = done, time.monotonic()

            def skip(self, done: int) -> None:
                self.start, self.began = done, time.monotonic()
                progress.reset(task, completed=done)

            def update(self, done: int, remark: str = "", speed: str = "", part: tuple[int, int] = (0, 0)) -> None:
                rate = (done - self.start) / max(time.monotonic() - self.began, 1e-9)
                progress.update(task, completed=done, remark=f"{remark}  {speed or f'{rate:.3g} {unit}/s'}")
                progress.update(inner, completed=part[0], total=part[1] or None)

        yield Bar()


def duration(seconds: float) -> str:
    """Seconds as a person says them: `42 s`, `3 min`, `1 h 05 min`."""
    if seconds == float("inf"):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, unit: str) -> str:
    """`1 window`, `19 windows`."""
    return f"{count:,} {unit}{'' if count == 1 else 's'}"
