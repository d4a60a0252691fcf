"""Signals that end long work: once it is safe, or at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

PASSED_ON = 3.0  # seconds within which torchrun passes on a signal that its processes have had already
_NO_MORE = b"\0"  # which is no signal


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request, so that the step in progress can be finished and saved.

    The second one stops at once, even inside a long call of the library. Python runs a handler only between two of its
    own instructions; but the system notes every signal in a pipe as it comes, and a thread reads it. Under torchrun,
    which passes on what it gets, a signal to all processes comes twice: a second one soon after the first is none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, lambda *_: None)
        self._descriptor_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="signals")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._descriptor_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, _NO_MORE)  # to close it would not do: a process forked meanwhile may hold it open
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    def _watch(self) -> None:
        first = 0.0
        while (byte := os.read(self._read, 1)) != _NO_MORE:
            if byte[0] not in self._before:
                continue
            if self.received is None:
                self.received, first = byte[0], time.monotonic()
            elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() > first + PASSED_ON:
                # Files are replaced whole or not at all, the lock goes with the process; but a bar hides the cursor.
                show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
                os.write(2, show_cursor + b"\nerror: stopped at once; --resume goes on from what was saved last\n")
                os._exit(128 + byte[0])
