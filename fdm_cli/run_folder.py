"""A training run's files, and the signals that end it.

    config.yaml  data.json  metrics.jsonl  checkpoints/step-00001000.pt

One process at a time: the folder is locked, and the lock goes away with the process, however it ends.
"""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from fdm_cli import config as configuration
from fdm_cli.checkpoint import read_state, save_state
from fdm_cli.config import Config
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.files import replacing

_CHECKPOINT = re.compile(r"step-(\d{8,})\.pt")


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.data = path / "data.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process. Raises BadInput when another one holds it or it cannot be made."""
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", blocking=False)
            lock.acquire()
        except Timeout:
            raise BadInput(
                f"{self.path}: another process is training here", "wait for it, or use another --run"
            ) from None
        except OSError as error:
            raise BadInput(f"cannot use {self.path}: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()

    def checkpoints(self) -> list[Path]:
        """Complete checkpoint files, oldest first."""
        folder = self.path / "checkpoints"
        found = [(int(match[1]), file) for file in folder.glob("*.pt") if (match := _CHECKPOINT.fullmatch(file.name))]
        return [file for _, file in sorted(found)]

    def newest_state(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest readable checkpoint's content, or None; and one remark for each unreadable newer one.

        Raises:
            BadInput: there are checkpoints and none of them is readable.
        """
        remarks: list[str] = []
        for file in reversed(self.checkpoints()):
            try:
                return read_state(file), remarks
            except BadInput as error:
                remarks.append(error.message)
        if remarks:
            raise BadInput(f"no readable checkpoint is left: {remarks[0]}")
        return None, remarks

    def write_config(self, config: Config) -> None:
        """Writes config.yaml."""
        with replacing(self.config) as temporary:
            temporary.write_text(configuration.to_yaml(config), encoding="utf-8")

    def write_data(self, fingerprint: str, about: str) -> None:
        """Writes data.json: what the run trains on."""
        with replacing(self.data) as temporary:
            temporary.write_text(json.dumps({"fingerprint": fingerprint, "about": about}) + "\n", encoding="utf-8")

    def check_data(self, fingerprint: str, about: str) -> None:
        """Raises BadInput when the run has been trained on other data; a run that did not note it is believed."""
        try:
            before = json.loads(self.data.read_text(encoding="utf-8"))
            same, was = before["fingerprint"] == fingerprint, before["about"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if not same:
            newest = self.checkpoints()[-1:]
            raise BadInput(
                f"{self.path}: the data has changed since the run began: {was} then, {about} now",
                f"bring it back, or start another run with --init-from {newest[0] if newest else 'CHECKPOINT'}",
            )

    def save(self, state: Mapping[str, Any], keep: int) -> Path:
        """Writes a checkpoint and deletes all but the newest `keep`. Raises RunFailed, older files intact."""
        path = self.path / "checkpoints" / f"step-{state['step']:08d}.pt"
        save_state(path, state)
        for old in self.checkpoints()[:-keep]:
            old.unlink(missing_ok=True)
        return path

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl; JSON knows no NaN, so a number that is not finite becomes null."""
        finite = {
            key: None if value != value or value in (math.inf, -math.inf) else value for key, value in record.items()
        }
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            raise RunFailed(f"cannot write {self.metrics}: {error.strerror or error}") from None

    def forget_metrics_after(self, step: int) -> None:
        """Drops the lines of steps that a resumed run does again, and a half-written last line."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        with replacing(self.metrics) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request, so that the step in progress can be finished and saved.

    The second one stops at once: the handlers that were there before are back by then.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
