"""What an interrupted rollout leaves behind, so that it can go on: a hidden folder beside its output.

    .video.gif.work/  run.json  frames.f32  journal.jsonl  may-replace

`run.json` says what the run is, `may-replace` which outputs it may write over. `frames.f32` holds every frame made so
far (`frame_store.py`). The journal gets one line for each round of batches, after its frames: a round counts only when
its line is whole and its frames have the checksum that the line says, so neither a kill at any moment nor a loss of
power, which may keep a later write and lose an earlier one, makes a half-written round count.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import BaseFileLock, FileLock, Timeout

from fdm_cli.errors import BadInput
from fdm_cli.files import hidden_name, replacing, sync, write_failures

if TYPE_CHECKING:
    from fdm_cli.frame_store import FrameStore

# What a run that goes on takes from run.json where the user does not say, and so what it may be.
_TAKEN_OVER = {"seed": range(2**63), "threads": range(1, 1025), "max_batch": range(1, 65_537)}
SYNC_INTERVAL = 10.0  # seconds of work that a loss of power may cost; a killed process loses none


class Journal:
    """The rounds that are finished: first those of an earlier run are read back, then new ones are appended.

    Args:
        path: the file; made when missing.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path
        self._file = path.open("r+b")
        self._start = 0
        self._synced = time.monotonic()

    def close(self) -> None:
        """Closes the file; what could not be written was reported when it was appended."""
        with contextlib.suppress(OSError):
            self._file.close()

    def next(self) -> dict[str, Any] | None:
        """The next round of the earlier run; None when there is none, or only a piece of its line."""
        self._start = self._file.tell()
        line = self._file.readline()
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            self.reject()
            return None
        return record

    def reject(self) -> None:
        """The round that was read last does not count, nor do those after it."""
        self._file.seek(self._start)
        self._file.truncate()

    def append(self, record: Mapping[str, Any], store: FrameStore) -> None:
        """Adds a round whose frames are in the store; now and then both are flushed to the disk."""
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_INTERVAL:
            store.sync()
            sync(self._path)
            self._synced = time.monotonic()


class WorkFolder:
    """The files of one rollout.

    Args:
        output: the video that is being made; the folder stands beside it.

    Attributes:
        path: the folder.
        frames: the file of frames.
        journal: open within `opened`.
    """

    journal: Journal

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(hidden_name(output.name, ".work"))
        self.frames = self.path / "frames.f32"
        self._run = self.path / "run.json"
        self._journal = self.path / "journal.jsonl"
        self._may_replace = self.path / "may-replace"

    def facts(self) -> dict[str, Any] | None:
        """What the interrupted run was; None when there is none. Raises BadInput when that cannot be read."""
        try:
            facts = json.loads(self._run.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise BadInput(f"{self._run}: not readable: {error}", "--force starts over") from None
        if not isinstance(facts, dict) or any(
            type(facts[name]) is not int or facts[name] not in allowed
            for name, allowed in _TAKEN_OVER.items()
            if name in facts
        ):
            raise BadInput(f"{self._run}: not what this program writes", "--force starts over")
        return facts

    @property
    def worthwhile(self) -> bool:
        """Whether any round is finished."""
        return self._journal.exists() and self._journal.stat().st_size > 0

    @property
    def replaceable(self) -> frozenset[str]:
        """The names of outputs that may be replaced when the run goes on."""
        try:
            return frozenset(json.loads(self._may_replace.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return frozenset()

    def let_replace(self, names: Iterable[str]) -> None:
        """These may be replaced from here on, too: the user said so, or they are this run's own."""
        names = sorted(self.replaceable.union(names))
        with replacing(self._may_replace) as temporary:
            temporary.write_text(json.dumps(names), encoding="utf-8")

    @contextmanager
    def opened(self, facts: Mapping[str, Any], resume: bool, checkpoint: str) -> Iterator[None]:
        """Holds the folder for this process; removed when the block ends well, or when nothing was finished.

        Args:
            facts: what this run is, plain JSON values.
            resume: go on with what is there; else it is thrown away.
            checkpoint: the model's file, noted for who resumes with another one: a run's folder may have a newer one.

        Raises:
            BadInput: another process works here; a run with other facts is to be resumed.
            RunFailed: the folder cannot be written.
        """
        with write_failures(self.path):
            self.path.mkdir(exist_ok=True)
        lock = self._lock()
        done, anew, rubbish = False, False, None
        try:
            with write_failures(self.path):
                # Frames of which nobody says what they are belong to another run, killed while it was thrown away.
                recorded = self.facts() if resume else None
                if recorded is not None:
                    self._check(recorded, facts)
                self._clear(keep_run=recorded is not None)
                anew = recorded is None
                with replacing(self._run) as temporary:
                    noted = {**facts, "checkpoint": (recorded or {}).get("checkpoint", checkpoint)}
                    temporary.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
                self.journal = Journal(self._journal)
            yield
            done = True
        finally:
            if hasattr(self, "journal"):
                self.journal.close()
                rubbish = self._set_aside() if done or not self.worthwhile else None
            elif anew:  # a full disk
                rubbish = self._set_aside()
            lock.release()  # network file systems keep a file, and so its folder, that is open
            if rubbish:
                shutil.rmtree(rubbish, ignore_errors=True)

    def refuse_busy(self) -> None:
        """Raises BadInput when another process works here."""
        self._lock().release()

    def _lock(self) -> BaseFileLock:
        lock = FileLock(self.path / ".lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise BadInput(
                f"{self.path}: another process is at work here", "wait for it, or name another --output"
            ) from None
        return lock

    def _check(self, recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        for name, value in json.loads(json.dumps(facts)).items():
            if recorded.get(name) != value:
                hint = "--resume needs the same options; --force starts over"
                if name == "checkpoint_sha256" and "checkpoint" in recorded:
                    hint = f"it was begun with --checkpoint {recorded['checkpoint']}; --force starts over"
                raise BadInput(
                    f"{self.path} was begun with {name.replace('_', ' ')} {_shorten(recorded.get(name))}, "
                    f"this is {_shorten(value)}",
                    hint,
                )

    def _clear(self, keep_run: bool) -> None:
        """Removes half-written videos of a killed process and, unless the run goes on, all of it."""
        kept = {self._run, self.frames, self._journal, self._may_replace} if keep_run else set()
        for entry in self.path.iterdir():
            if entry.name != ".lock" and entry not in kept:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _set_aside(self) -> Path | None:
        """Under another name, to be removed: killed meanwhile, it leaves rubbish but no folder that looks resumable."""
        rubbish = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            return self.path.rename(rubbish)
        except OSError:
            return None


def _shorten(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
