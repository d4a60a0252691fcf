"""A training run's files.

    config.yaml  data.json  metrics.jsonl  loss.png  checkpoints/step-00001000.pt  samples/step-00001000.gif
    own/00000.npy

One process at a time: the folder is locked, and the lock goes away with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fdm_cli import config as configuration
from fdm_cli.checkpoint import read_state, save_state
from fdm_cli.config import Config
from fdm_cli.curve_picture import Curve, draw
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.files import finite, refuse_unencodable, remove_partial, replacing
from fdm_cli.picture import write_png

SMOOTHING = 0.98  # of the training loss
MOST_POINTS = 2000  # of a curve
_CHECKPOINT = re.compile(r"step-(\d{8,})\.pt")


class SmoothLoss:
    """The mean of the losses so far, the latest counting most; the first one no more than the second."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> float:
        """The mean with one more."""
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._sum / self._weight


class _Points:
    """Those of a curve, evenly thinned out: at most MOST_POINTS, however long the run is."""

    def __init__(self) -> None:
        self.kept: list[tuple[float, float]] = []
        self._every, self._seen = 1, 0

    def add(self, step: int, value: float) -> None:
        """The next point."""
        if self._seen % self._every == 0:
            self.kept.append((step, value))
        if len(self.kept) > MOST_POINTS:
            del self.kept[1::2]
            self._every *= 2
        self._seen += 1


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
        self.own = path / "own"

    def refuse_foreign(self) -> None:
        """Raises BadInput when a new run would overwrite files of something else, or cannot be written here."""
        refuse_unencodable(self.path)
        if not (self.path / ".lock").is_file():  # which any run makes first; a folder checkpoints others make, too
            for file in (self.config, self.data, self.metrics, self.path / "loss.png"):
                if file.exists():
                    raise BadInput(f"{file} is there already and belongs to no run", "--run names another folder")
        nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
            raise BadInput(f"cannot use {self.path}: {nearest} is no folder that can be written to")

    def refuse_run(self) -> None:
        """Raises BadInput when the folder holds a run."""
        if self.checkpoints():
            raise BadInput(f"{self.path} already holds a run", "--resume goes on with it; --run names another folder")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; of a run that does not begin, nothing is left that was not there before.

        Raises:
            BadInput: another process holds it, or it cannot be made.
        """
        # Those that are made here, what lies within others first. Of a run that begins meanwhile nothing is removed:
        # it makes its lock anew and then the folder of checkpoints.
        made = [self.path / "checkpoints", self.path / ".lock", self.path, *self.path.parents]
        made = [path for path in made if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", blocking=False)
            lock.acquire()
        except Timeout:
            raise BadInput(
                f"{self.path}: another process is training here", "wait for it, or use another --run"
            ) from None
        except OSError as error:
            raise BadInput(f"cannot use {self.path}: {error.strerror or error}") from None
        try:
            try:
                (self.path / "checkpoints").mkdir(exist_ok=True)
            except OSError as error:
                raise BadInput(f"cannot use {error.filename}: {error.strerror}") from None
            yield
        finally:
            if not (self.config.exists() or self.data.exists() or self.checkpoints()):
                with contextlib.suppress(OSError):  # a folder that is not empty, or is gone
                    for path in made:
                        with contextlib.suppress(FileNotFoundError):  # what could not be made
                            path.unlink() if path.name == ".lock" else path.rmdir()
            lock.release()

    def checkpoints(self) -> list[Path]:
        """Complete checkpoint files, oldest first."""
        folder = self.path / "checkpoints"
        found = [(int(match[1]), file) for file in folder.glob("*.pt") if (match := _CHECKPOINT.fullmatch(file.name))]
        return [file for _, file in sorted(found)]

    def newest_state(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest readable checkpoint's content, or None; and one remark for each unreadable newer one.

        To go on from it, `set_aside_after` its step: an unreadable file must not count as the run's newest.

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

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints of later steps, which could not be read; the folder is locked."""
        for file in self.checkpoints():
            match = _CHECKPOINT.fullmatch(file.name)
            if match and int(match[1]) > step:
                file.rename(file.with_suffix(".pt.unreadable"))

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
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        except OSError as error:
            raise RunFailed(f"cannot write {self.metrics}: {error.strerror or error}") from None

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl, one by one; one that was cut short by a kill is left out."""
        if not self.metrics.exists():
            return
        with self.metrics.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield record

    def forget_metrics_after(self, step: int) -> None:
        """Drops the lines of steps that a resumed run does again, and a half-written last line."""
        if self.metrics.exists():
            kept = (json.dumps(record) + "\n" for record in self.read_metrics() if record["step"] <= step)
            with replacing(self.metrics) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(kept)

    def draw_losses(self) -> None:
        """Writes loss.png: the training loss, smoothed, and the held-out loss. Raises RunFailed."""
        smooth = SmoothLoss()
        training, held_out = _Points(), _Points()
        for record in self.read_metrics():
            if isinstance(record.get("loss"), float):
                training.add(record["step"], smooth.add(record["loss"]))
            if isinstance(record.get("held_out_loss"), float):
                held_out.add(record["step"], record["held_out_loss"])
        curves = [
            Curve("training loss, smoothed", training.kept, (28, 74, 138)),
            Curve("held-out loss", held_out.kept, (213, 94, 0), dots=True),
        ]
        write_png(self.path / "loss.png", draw(curves, "step"), force=True)

    def sample_path(self, step: int) -> Path:
        """Where the preview made after this step goes."""
        return self.path / "samples" / f"step-{step:08d}.gif"

    def clean(self) -> None:
        """Removes what a killed process left half-written; the folder is locked."""
        for folder in (self.path, self.path / "checkpoints", self.path / "samples", self.own):
            remove_partial(folder)
