"""Measures what the README claims: `make bench`.

Two things that are compared run in turn, and the ratio of their medians is what counts: the machine may be
shared. Prints one line a figure.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

FDM = str(Path(sys.executable).parent / "fdm")


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Medians of two things, run alternately after a warm-up each."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def start_up() -> None:
    """The commands that answer without torch, beside a bare interpreter."""
    for arguments in (["--help"], ["inspect-scheme", "autoregressive", "--length", "160"]):
        ours, bare = in_turn(
            lambda arguments=arguments: subprocess.run([FDM, *arguments], capture_output=True, check=True),
            lambda: subprocess.run([sys.executable, "-c", "pass"], capture_output=True, check=True),
            rounds=9,
        )
        print(f"start-up     fdm {' '.join(arguments):46s} {ours:6.3f} s   python -c pass {bare:6.3f} s")


if __name__ == "__main__":
    start_up()
