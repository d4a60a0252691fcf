"""Frames -> a video file, written while they are made.

A file is written under a hidden name, in its own folder or in one for such files, read back and counted, synced, and
renamed: it is either complete or not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from types import TracebackType

import numpy as np

from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.files import partial_name, refuse_parent, sync, sync_folder, write_failures
from fdm_cli.video import read
from fdm_cli.video_encoders import ENCODERS, FOLDER, Encoder, apng_delay
from fdm_cli.video_info import MAX_FRAME_PIXELS, MAX_PICTURE_FRAMES, MAX_PICTURE_PIXELS, MAX_VIDEO_PIXELS, Frame

SUFFIXES = (".gif", ".mp4", ".npz", ".webp", ".apng")
MOST_BYTES = 240  # of a name, to which `.sheet.png` may be added
MIN_FPS, MAX_FPS = 0.01, 1000.0
MAX_SIDE = {".gif": 65535, ".webp": 16383, ".mp4": 16384}


def check_output(path: Path, force: bool = False) -> str:
    """Refuses an output that could not be written, before any work is done for it.

    Args:
        path: where the video shall go; its extension says the format. One without is a folder, which gets
            frame-000000.png and so on.
        force: replace what is there. A folder is replaced only when it holds nothing but such frames.

    Returns:
        the format: one of SUFFIXES or FOLDER.

    Raises:
        BadInput: unknown extension, existing output, missing or unwritable parent folder.
    """
    suffix = path.suffix.lower()
    is_folder = not suffix
    known = f"known: {', '.join(SUFFIXES)}, or a name without ending for {FOLDER}"
    if not is_folder and suffix not in SUFFIXES:
        raise BadInput(f"{path}: cannot write {suffix} files", known)
    if path.name in ("", ".."):
        raise BadInput(f"{path}: cannot be replaced by a video", "name a new folder or file")
    if len(os.fsencode(path.name)) > MOST_BYTES:
        raise BadInput(f"{path}: the name is longer than {MOST_BYTES} bytes", "with its endings, 255 are allowed")
    refuse_parent(path)
    if path.is_dir() and not is_folder:
        raise BadInput(f"{path}: is a folder", "choose another name")
    if os.path.lexists(path):
        if is_folder and not path.is_dir():
            raise BadInput(f"{path}: is a file, not a folder", f"choose another name; {known}")
        if is_folder and not all(_is_frame(entry) for entry in path.iterdir()):
            raise BadInput(f"{path}: the folder holds other files than frames", "choose a new or empty folder")
        if not force and not (is_folder and not any(path.iterdir())):
            raise BadInput(f"{path}: exists already", "--force replaces it")
    return FOLDER if is_folder else suffix


def real_fps(path: Path, fps: float) -> float:
    """The rate that a file of this name can hold and that is nearest to `fps`.

    A GIF's frames last whole hundredths of a second, a WebP's whole milliseconds; theirs and an APNG's more than 10
    milliseconds, since less is slowed down by browsers, and taken for such when it is read.

    Raises:
        BadInput: a rate outside 0.01 to 1000 frames per second.
    """
    if not MIN_FPS <= fps <= MAX_FPS:
        raise BadInput(f"{fps:g} frames per second is not between {MIN_FPS} and {MAX_FPS:g}", "--fps N sets the rate")
    suffix = path.suffix.lower()
    if suffix == ".gif":
        return 100 / min(65535, max(2, round(100 / fps)))
    if suffix == ".webp":
        return 1000 / max(11, round(1000 / fps))
    if suffix == ".apng":
        return float(1 / apng_delay(min(fps, 90.0)))
    return fps


def open_writer(
    path: Path,
    fps: float,
    *,
    force: bool = False,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    folder: Path | None = None,
) -> Writer:
    """A writer for a video at `path`, to be used in a `with` block.

    Args:
        path: as for `check_output`.
        fps: the rate asked for; the writer's `fps` is the one it gets.
        force: as for `check_output`.
        frames: how many will come, if known: what the format cannot hold is then refused at once.
        size: their height and width, if known: likewise.
        folder: where the unfinished file lies, on the same disk; None is beside `path`.

    Raises:
        BadInput: as `check_output` and `real_fps`; more or larger frames than this tool reads back of such a file.
    """
    kind = check_output(path, force)
    if size is not None:
        _check_size(path, kind, *size)
        most = MAX_VIDEO_PIXELS if kind in (".mp4", ".npz", FOLDER) else MAX_PICTURE_PIXELS
        if size[0] * size[1] * (frames or 1) > most:
            raise BadInput(
                f"{path}: {frames} frames of {size[1]}x{size[0]}; such files hold at most {most:.0e} pixels in all",
                "a smaller --scale, or write .mp4 or .npz",
            )
    if frames is not None and frames > MAX_PICTURE_FRAMES and kind not in (".mp4", ".npz"):
        raise BadInput(f"{path}: {frames} frames; such files hold at most {MAX_PICTURE_FRAMES}", "write .mp4 or .npz")
    return Writer(path, kind, real_fps(path, fps), force, folder)


class Writer:
    """Writes frames as they come; the file appears under its name when the `with` block ends without an exception.

    Args:
        path: where it goes.
        kind: one of SUFFIXES or FOLDER.
        fps: frames per second, as `real_fps` gives it.
        force: replace what is there.
        folder: as for `open_writer`.

    Attributes:
        fps: the rate that the file really has.
        frames: how many have been written.
        size: the height and width that the file really has, known after the first frame.
        remarks: lines that the user should see, known after the first frame.
    """

    def __init__(self, path: Path, kind: str, fps: float, force: bool, folder: Path | None = None) -> None:
        self.path = path
        self.kind = kind
        self.fps = fps
        self.force = force
        self.frames = 0
        self.size = (0, 0)
        self.remarks: tuple[str, ...] = ()
        self._shape: tuple[int, ...] = ()
        name = partial_name(path.name, "" if kind == FOLDER else kind)
        self._temporary = (folder or path.parent) / name
        self._encoder: Encoder | None = None

    def __enter__(self) -> Writer:
        """Nothing is opened before the first frame."""
        return self

    def write(self, frame: Frame) -> None:
        """Appends one frame, uint8 `(H, W, C)`, C 1 or 3; all frames have one shape.

        Raises:
            BadInput: frames larger than the format can hold.
            RunFailed: the disk is full, or writing failed otherwise.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] not in (1, 3):
            raise ValueError(f"a frame is uint8 (H, W, 1 or 3), not {frame.dtype} {frame.shape}")
        if self._shape and frame.shape != self._shape:
            raise ValueError(f"frame {self.frames} is {frame.shape}, the first one {self._shape}")
        with write_failures(self.path):
            if self._encoder is None:
                self._begin(frame)
            assert self._encoder is not None  # noqa: S101  (_begin made it)
            self._encoder.write(frame)
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the file, or removes what was written of it."""
        try:
            if error is None:
                with write_failures(self.path):
                    self._complete()
        finally:
            if self._encoder is not None:
                with contextlib.suppress(Exception):
                    self._encoder.abort()
            _remove(self._temporary)

    def _begin(self, frame: Frame) -> None:
        self._shape = frame.shape
        height, width, _ = frame.shape
        _check_size(self.path, self.kind, height, width)
        _remove(self._temporary)
        self._encoder = ENCODERS[self.kind](self._temporary, self.fps, frame)
        self.size = (height, width)
        if self.kind == ".mp4" and (height % 2 or width % 2):
            self.size = (height + height % 2, width + width % 2)
            self.remarks = (f"{width}x{height} padded to {self.size[1]}x{self.size[0]}: MP4 needs even sizes",)

    def _complete(self) -> None:
        if self._encoder is None:
            raise RunFailed(f"{self.path}: no frames to write")
        self._encoder.finish()
        try:
            found = read(self._temporary).info.frames
        except BadInput as error:
            raise RunFailed(f"cannot write {self.path}: what was written is broken; {error.message}") from error
        if found != self.frames:
            raise RunFailed(f"cannot write {self.path}: {found} of {self.frames} frames arrived on the disk")
        if self.kind == FOLDER:
            for entry in self._temporary.iterdir():
                sync(entry)
            sync_folder(self._temporary)
        else:
            sync(self._temporary)
        if os.path.lexists(self.path):
            check_output(self.path, self.force)
        if self.path.is_dir():
            old = self._temporary.with_suffix(".old")
            self.path.rename(old)
            self._temporary.rename(self.path)
            _remove(old)
        else:
            self._temporary.replace(self.path)
        sync_folder(self.path.parent)


def _check_size(path: Path, kind: str, height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE.get(kind, height + width) or height * width > MAX_FRAME_PIXELS:
        raise BadInput(f"{path}: frames of {width}x{height} are too large for {kind}", "a smaller --scale")


def _is_frame(entry: Path) -> bool:
    """Whether this is a frame that a folder writer wrote."""
    return entry.name.startswith("frame-") and entry.suffix == ".png" and entry.is_file()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
