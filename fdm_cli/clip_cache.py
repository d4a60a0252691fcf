"""Videos decoded once: all frames of a data set at the model's size and channels, in one memory-mapped file.

    <cache>/<key>/frames.bin     uint8 (frames, H, W, C), video after video
    <cache>/<key>/videos.json    what each video is and where its frames begin, and what could not be read

The key is made of the files' names, sizes and times and of what the frames were fitted to, so a changed file or
another model size is another cache. A cache is written under another name and renamed when it is whole; a lock, which
ends with its process however that ends, keeps two processes from writing the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fdm_cli import data_files, video
from fdm_cli.data_files import DataFiles, Source
from fdm_cli.errors import BadInput
from fdm_cli.files import expanded, sync, sync_folder, write_failures
from fdm_cli.video_info import VideoInfo

VERSION = 2  # of the format, and of how videos are read and fitted
FRAMES_A_REPORT = 100
WRITE_BUFFER = 1 << 20


@dataclass(frozen=True)
class CachedVideo:
    """A video in the cache.

    Attributes:
        name: of its file within the data set.
        kind: what the file is, e.g. "GIF".
        start: the index of its first frame in the cache.
        frames: how many it has.
        height, width, channels, fps: of the file, before fitting.
        digest: sha256 of the file's content.
    """

    name: str
    kind: str
    start: int
    frames: int
    height: int
    width: int
    channels: int
    fps: float
    digest: str


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read: why, in one line that names it (within the data set), and what can be done."""

    message: str
    hint: str | None


@dataclass(frozen=True)
class Decoding:
    """How far decoding is: files done of all, and frames so far; or that another process does it and is waited for."""

    done: int
    total: int
    frames: int
    waiting: bool = False


def cache_folder() -> Path:
    """Where caches lie: $FDM_CACHE, else fdm in $XDG_CACHE_HOME, else in ~/.cache."""
    if os.environ.get("FDM_CACHE"):
        return expanded(os.environ["FDM_CACHE"])
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fdm"


class ClipCache:
    """The cache of one data set for one model size; there on disk or not yet.

    Args:
        data: the files.
        size: H = W of the model.
        channels: 1 or 3.

    Attributes:
        folder: where it lies once it is there.
    """

    def __init__(self, data: DataFiles, size: int, channels: int) -> None:
        self.data, self.size, self.channels = data, size, channels
        key = hashlib.sha256(f"{VERSION} {size} {channels} ".encode() + os.fsencode(data.root.resolve()))
        for file in data.files:
            try:
                facts = file.stat()
            except OSError:  # e.g. a dangling link; reading it will say so
                key.update(f"\n{data.relative(file)!r}".encode())
            else:
                # A file that must not be read today may be readable tomorrow, unchanged.
                denied = "" if os.access(file, os.R_OK) else " unreadable"
                key.update(f"\n{data.relative(file)!r} {facts.st_size} {facts.st_mtime_ns}{denied}".encode())
        self.folder = cache_folder() / key.hexdigest()[:32]

    @cached_property
    def _index(self) -> dict[str, Any]:
        return json.loads((self.folder / "videos.json").read_text(encoding="utf-8"))

    @cached_property
    def videos(self) -> tuple[CachedVideo, ...]:
        """Every video that could be read, however short."""
        return tuple(CachedVideo(**entry) for entry in self._index["videos"])

    @cached_property
    def skipped(self) -> tuple[Skipped, ...]:
        """Every file that could not be read."""
        return tuple(Skipped(**entry) for entry in self._index["skipped"])

    @cached_property
    def frames(self) -> NDArray[np.uint8]:
        """All frames, (frames, H, W, C) uint8, memory-mapped: read only where they are looked at."""
        file, offset = self._index["file"] or self.folder / "frames.bin", self._index["offset"]
        count = sum(entry.frames for entry in self.videos)
        if count == 0:
            return np.zeros((0, self.size, self.size, self.channels), np.uint8)
        return np.memmap(file, np.uint8, "r", offset, (count, self.size, self.size, self.channels))

    def exists(self) -> bool:
        """Whether it is there, whole."""
        try:
            index = json.loads((self.folder / "videos.json").read_text(encoding="utf-8"))
            held = (self.folder / "frames.bin").stat().st_size
            return index["file"] is not None or held == self._frame_bytes * sum(v["frames"] for v in index["videos"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def fill(self, strict: bool = False) -> Iterator[Decoding]:
        """Decodes every video, unless that has been done; yields how far it is.

        One `.npy` that is already as the model wants it is not copied, only noted.

        Args:
            strict: a file that cannot be read is an error, not skipped.

        Raises:
            BadInput: `strict`, and a file cannot be read.
            RunFailed: the cache cannot be written, e.g. because the disk is full.
        """
        if self.exists():
            return
        with write_failures(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder.with_suffix(".lock"))
            try:
                lock.acquire(blocking=False)
            except Timeout:
                yield Decoding(0, 0, 0, waiting=True)
                lock.acquire()
            try:
                if not self.exists():
                    yield from self._fill_locked(strict)
            finally:
                lock.release()

    def _fill_locked(self, strict: bool) -> Iterator[Decoding]:
        part = self.folder.with_suffix(".part")
        # Whoever left these behind is dead, as the lock shows.
        for leftover in (part, self.folder):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            part.mkdir()
            yield from self._write(part, strict)
            part.rename(self.folder)
            sync_folder(self.folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    @property
    def _frame_bytes(self) -> int:
        return self.size * self.size * self.channels

    def _write(self, part: Path, strict: bool) -> Iterator[Decoding]:
        """Decodes into `part`."""
        sources = data_files.sources(self.data)
        videos: list[CachedVideo] = []
        skipped: list[Skipped] = []
        mapped: tuple[Path, int] | None = None
        with (part / "frames.bin").open("wb", buffering=WRITE_BUFFER) as out:
            for done, source in enumerate(sources):
                begin = videos[-1].start + videos[-1].frames if videos else 0
                yield Decoding(done, len(sources), begin)
                try:
                    if len(sources) == 1:
                        mapped = self._fitting_array(source)
                    entries = []
                    start, digest = begin, _digest(source)
                    for opened in data_files.open_videos(source, part / "unpacked.npy"):
                        frames = opened.info.frames or 0
                        if mapped is None:
                            frames = 0
                            for frame in opened:
                                out.write(video.fit(frame, self.size, self.channels).tobytes())
                                frames += 1
                                if frames % FRAMES_A_REPORT == 0:
                                    yield Decoding(done, len(sources), start + frames)
                        entries.append(_entry(self.data.relative(source.path), opened.info, start, frames, digest))
                        start += frames
                except BadInput as error:
                    data_files.refuse_passing(error, source.path)
                    if strict:
                        raise
                    skipped.append(Skipped(error.message.replace(f"{self.data.root}{os.sep}", "", 1), error.hint))
                    out.seek(begin * self._frame_bytes)
                    out.truncate()
                else:
                    videos += entries
                (part / "unpacked.npy").unlink(missing_ok=True)
        index = {
            "file": str(mapped[0]) if mapped else None,
            "offset": mapped[1] if mapped else 0,
            "videos": [asdict(entry) for entry in videos],
            "skipped": [asdict(entry) for entry in skipped],
        }
        (part / "videos.json").write_text(json.dumps(index), encoding="utf-8")
        for path in (part / "frames.bin", part / "videos.json"):
            sync(path)
        sync_folder(part)

    def _fitting_array(self, source: Source) -> tuple[Path, int] | None:
        """The file and the byte where its frames begin, when it is an NPY that can be mapped as it is."""
        if source.path.suffix.lower() != ".npy":
            return None
        array, _ = data_files.read_array(source.path, source.path)
        if array.shape[2:] != (self.size, self.size, self.channels) or not array.flags.c_contiguous:
            return None
        return (source.path.resolve(), array.offset) if isinstance(array, np.memmap) else None


def _entry(name: str, info: VideoInfo, start: int, frames: int, digest: str) -> CachedVideo:
    return CachedVideo(name, info.kind, start, frames, info.height, info.width, info.channels, info.fps, digest)


def _digest(source: Source) -> str:
    """The sha256 of a source's files, names included where there are several.

    Raises:
        BadInput: a file that is to be left out.
        RunFailed: one that may be readable the next time, unchanged: what is left out of a cache is left out for good.
    """
    digest = hashlib.sha256()
    for path in source.files:
        if not path.is_file():
            raise BadInput(f"{path}: not a regular file")
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            data_files.refuse_passing(error, path)
            raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
        if len(source.files) > 1:
            digest.update(os.fsencode(path.name))
    return digest.hexdigest()
