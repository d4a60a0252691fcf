"""What can go wrong, as types: a message, a hint, an exit code.

The library raises these; `cli/main.py` is the one place that turns them into a line on stderr
and an exit code.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST_SHOWN = 4000  # characters: of a path, Linux allows 4096 bytes


class FdmError(Exception):
    """An expected failure: one line that says what is wrong and where, one line that says what to do.

    Args:
        message: what is wrong, and where; one line.
        hint: what the user can do about it; one line, or None.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RunFailed(FdmError):
    """The input was fine, the work failed: disk full, loss not a number."""


class BadInput(FdmError):
    """Wrong usage or an unusable file, found before any work was done."""

    exit_code = 2


class Interrupted(FdmError):
    """Stopped by a signal after everything was saved: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, signal_number: int, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


class Silenced(FdmError):
    """Nothing is left to say, as another process has said it, or nobody reads any more: an exit code and no words."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def is_out_of_memory(error: Exception) -> bool:
    """By name and words: torch need not be loaded, and on a CPU it has no type for this."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED"))
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """One line of hint for a name that does not exist: the nearest real one, else all of them."""
    names = sorted(known)
    folded = {known_name.lower(): known_name for known_name in names}
    near = get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    near = near or [known_name for known_name in folded if name and known_name.startswith(name.lower())]
    if near:
        return f"did you mean {folded[near[0]]!r}?"
    return "known: " + ", ".join(names) if names else "there are none"


def printable(text: str) -> str:
    """A text with names out of files, without what a terminal would obey; lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """The same in one line, and not endless."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN - 300]} ... {line[-200:]}"


def not_numbers() -> RunFailed:
    """What a model that was never trained, or whose training diverged, leads to."""
    return RunFailed("the model made frames that are not numbers", "is it trained?")
