"""Frames -> a video file, written while they are made.

GIF, APNG and WebP share one idea: Pillow encodes every frame as a picture of its own, and the compressed part of that
picture is wrapped as the next frame of the animation. So each frame is on disk before the next one comes, every
frame is kept (an encoder that sees the whole video merges identical ones), and memory does not grow.

A file is written under a hidden name in its own folder, read back and counted, synced, and renamed: it is either
complete or not there.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from fdm_cli.errors import BadInput, RunFailed, did_you_mean
from fdm_cli.files import sync, write_failures
from fdm_cli.video import MAX_PICTURE_FRAMES, Frame, read

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".gif", ".mp4", ".npz", ".webp", ".apng")
FOLDER = "a folder of PNG images"
MIN_FPS, MAX_FPS = 0.01, 1000.0
MAX_SIDE = {".gif": 65535, ".webp": 16383, ".mp4": 16384}
MP4_QUALITY = "10"  # x264's constant rate factor: 0 is lossless, 23 its default, visible on tiny frames


def check_output(path: str | Path, force: bool = False) -> str:
    """Refuses an output that could not be written, before any work is done for it.

    Args:
        path: where the video shall go; its extension says the format. One that ends in "/" or has no extension is a
            folder, which gets frame-000000.png and so on.
        force: replace what is there. A folder is replaced only when it holds nothing but such frames.

    Returns:
        the format: one of SUFFIXES or FOLDER.

    Raises:
        BadInput: unknown extension, existing output, missing or unwritable parent folder.
    """
    target, suffix = Path(path), Path(path).suffix.lower()
    is_folder = str(path).endswith(("/", os.sep)) or not suffix
    known = f"known: {', '.join(SUFFIXES)}, or a name that ends in / for {FOLDER}"
    if not is_folder and suffix not in SUFFIXES:
        hint = did_you_mean(suffix, SUFFIXES)
        raise BadInput(f"{path}: cannot write {suffix} files", hint if hint.startswith("did") else known)
    if target.name in ("", ".."):
        raise BadInput(f"{path}: cannot be replaced by a video", "name a new folder or file")
    if not target.parent.is_dir():
        raise BadInput(f"{path}: there is no folder {target.parent}", "make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{path}: the folder {target.parent} is not writable", "choose another place")
    if target.is_dir() and not is_folder:
        raise BadInput(f"{path}: is a folder", "choose another name")
    if os.path.lexists(target):
        if is_folder and not target.is_dir():
            raise BadInput(f"{path}: is a file, not a folder", f"choose another name; {known}")
        if is_folder and not all(_is_frame(entry) for entry in target.iterdir()):
            raise BadInput(f"{path}: the folder holds other files than frames", "choose a new or empty folder")
        if not force and not (is_folder and not any(target.iterdir())):
            raise BadInput(f"{path}: exists already", "--force replaces it")
    return FOLDER if is_folder else suffix


def real_fps(path: str | Path, fps: float) -> float:
    """The rate that a file of this name can hold and that is nearest to `fps`.

    A GIF's frames last whole hundredths of a second, at least two (less is slowed down by browsers); a WebP's whole
    milliseconds, at least 20.

    Raises:
        BadInput: a rate outside 0.01 to 1000 frames per second.
    """
    if not MIN_FPS <= fps <= MAX_FPS:
        raise BadInput(f"{fps:g} frames per second is not between {MIN_FPS} and {MAX_FPS:g}")
    suffix = Path(path).suffix.lower()
    if suffix == ".gif":
        return 100 / min(65535, max(2, round(100 / fps)))
    if suffix == ".webp":
        return 1000 / max(20, round(1000 / fps))
    if suffix == ".apng":
        return float(1 / _apng_delay(fps))
    return fps


def open_writer(
    path: str | Path, fps: float, *, force: bool = False, frames: int | None = None, folder: Path | None = None
) -> Writer:
    """A writer for a video at `path`, to be used in a `with` block.

    Args:
        path: as for `check_output`.
        fps: the rate asked for; the writer's `fps` is the one it gets.
        force: as for `check_output`.
        frames: how many will come, if known: what the format cannot hold is then refused at once.
        folder: where the unfinished file lies, on the same disk; None is beside `path`.

    Raises:
        BadInput: as `check_output` and `real_fps`; more frames than this tool reads back of such a file.
    """
    kind = check_output(path, force)
    if frames is not None and frames > MAX_PICTURE_FRAMES and kind not in (".mp4", ".npz"):
        raise BadInput(f"{path}: {frames} frames; such files hold at most {MAX_PICTURE_FRAMES}", "write .mp4 or .npz")
    return Writer(Path(path), kind, real_fps(path, fps), force, folder)


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
        remarks: lines that the user should see, known after the first frame.
    """

    def __init__(self, path: Path, kind: str, fps: float, force: bool, folder: Path | None = None) -> None:
        self.path = path
        self.kind = kind
        self.fps = fps
        self.force = force
        self.frames = 0
        self.remarks: tuple[str, ...] = ()
        self._shape: tuple[int, ...] = ()
        name = f".{path.name[:200]}.{os.getpid()}.part{'' if kind == FOLDER else kind}"
        self._temporary = (folder or path.parent) / name
        self._encoder: _Encoder | None = None

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
        most = MAX_SIDE.get(self.kind)
        if most and max(height, width) > most:
            raise BadInput(f"{self.path}: frames of {width}x{height} are too large for {self.kind}")
        _remove(self._temporary)
        self._encoder = _ENCODERS[self.kind](self._temporary, self.fps, frame)
        if self.kind == ".mp4" and (height % 2 or width % 2):
            even = f"{width + width % 2}x{height + height % 2}"
            self.remarks = (f"{width}x{height} padded to {even}: MP4 needs even sizes",)

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
        for entry in self._temporary.iterdir() if self.kind == FOLDER else ():
            sync(entry)
        sync(self._temporary)
        if os.path.lexists(self.path):
            check_output(f"{self.path}/" if self.kind == FOLDER else self.path, self.force)
        if self.path.is_dir():
            old = self._temporary.with_suffix(".old")
            self.path.rename(old)
            self._temporary.rename(self.path)
            _remove(old)
        else:
            self._temporary.replace(self.path)
        sync(self.path.parent)


def _is_frame(entry: Path) -> bool:
    """Whether this is a frame that a folder writer wrote."""
    return entry.name.startswith("frame-") and entry.suffix == ".png" and entry.is_file()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# Encoders: one a format. Each gets the temporary path, the rate and the first frame, which says the size.


class _Encoder(Protocol):
    def write(self, frame: Frame) -> None: ...

    def finish(self) -> None: ...

    def abort(self) -> None: ...


def _image(frame: Frame) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(frame[..., 0] if frame.shape[2] == 1 else frame))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """One image as the bytes of a file of its own."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class _FileEncoder:
    """An encoder that assembles the file itself."""

    def __init__(self, path: Path, fps: float, first: Frame) -> None:
        self.fps = fps
        self.height, self.width, self.channels = first.shape
        self.frames = 0
        self.file: IO[bytes] = path.open("w+b")
        try:
            self.begin()
        except BaseException:
            self.file.close()
            raise

    def begin(self) -> None:
        """Writes what comes before the first frame."""

    def write(self, frame: Frame) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        self.file.close()

    def abort(self) -> None:
        self.file.close()


class _Gif(_FileEncoder):
    """Grey frames share one palette of 256 greys and are exact; colour frames have 256 colours of their own each."""

    def begin(self) -> None:
        table = 0xF7 if self.channels == 1 else 0x70  # 256 colours of 8 bits for all frames, or none
        self.file.write(b"GIF89a" + struct.pack("<HHBBB", self.width, self.height, table, 0, 0))
        if self.channels == 1:
            self.file.write(bytes(level for level in range(256) for _ in range(3)))
        self.file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # loop for ever

    def write(self, frame: Frame) -> None:
        image = _image(frame) if self.channels == 1 else _image(frame).quantize(256)
        picture = _encoded(image, "GIF", optimize=False, interlace=0)
        bits = picture[10] & 7  # the palette's size is 2 ** (bits + 1)
        palette_end = 13 + 3 * (2 << bits)
        palette = picture[13:palette_end] if self.channels == 3 else b""
        start = picture.index(b"\x2c", palette_end)  # no extension comes before the image, nor holds such a byte
        self.file.write(b"\x21\xf9\x04\x04" + struct.pack("<HBB", round(100 / self.fps), 0, 0))
        self.file.write(b"\x2c" + struct.pack("<HHHHB", 0, 0, self.width, self.height, (0x80 | bits) if palette else 0))
        self.file.write(palette + picture[start + 10 : -1])

    def finish(self) -> None:
        self.file.write(b"\x3b")
        super().finish()


def _apng_delay(fps: float) -> Fraction:
    """Seconds a frame as a fraction of two 16-bit numbers."""
    delay = (1 / Fraction(fps).limit_denominator(1001)).limit_denominator(65535)
    return delay if delay.numerator <= 65535 else Fraction(round(delay))


class _Apng(_FileEncoder):
    """Lossless. The number of frames stands at the file's beginning and is filled in at the end."""

    def begin(self) -> None:
        self.delay = _apng_delay(self.fps)
        self.sequence = 0
        self.file.write(b"\x89PNG\r\n\x1a\n")
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 0 if self.channels == 1 else 2, 0, 0, 0)
        self.chunk(b"IHDR", header)
        self.counter = self.file.tell()
        self.chunk(b"acTL", struct.pack(">II", 0, 0))

    def chunk(self, name: bytes, body: bytes) -> None:
        self.file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))

    def number(self) -> bytes:
        self.sequence += 1
        return struct.pack(">I", self.sequence - 1)

    def write(self, frame: Frame) -> None:
        size = struct.pack(">IIII", self.width, self.height, 0, 0)
        self.chunk(b"fcTL", self.number() + size + struct.pack(">HHBB", *self.delay.as_integer_ratio(), 0, 0))
        picture = _encoded(_image(frame), "PNG")
        position = 8
        while position < len(picture):
            length, name = struct.unpack_from(">I4s", picture, position)
            if name == b"IDAT":
                body = picture[position + 8 : position + 8 + length]
                self.chunk(b"fdAT", self.number() + body) if self.frames else self.chunk(b"IDAT", body)
            position += 12 + length
        self.frames += 1

    def finish(self) -> None:
        self.chunk(b"IEND", b"")
        self.file.seek(self.counter)
        self.chunk(b"acTL", struct.pack(">II", self.frames, 0))
        super().finish()


class _WebP(_FileEncoder):
    """Lossless. The file's length stands at its beginning and is filled in at the end."""

    def begin(self) -> None:
        size = struct.pack("<I", self.width - 1)[:3] + struct.pack("<I", self.height - 1)[:3]
        self.file.write(b"RIFF\0\0\0\0WEBP")
        self.chunk(b"VP8X", b"\x02\0\0\0" + size)
        self.chunk(b"ANIM", b"\xff\xff\xff\xff\0\0")  # white behind it; loop for ever
        milliseconds = struct.pack("<I", min(0xFFFFFF, round(1000 / self.fps)))[:3]
        self.frame_header = bytes(6) + size + milliseconds + b"\x02"  # do not blend with the frame before

    def chunk(self, name: bytes, body: bytes) -> None:
        self.file.write(name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2))

    def write(self, frame: Frame) -> None:
        self.chunk(b"ANMF", self.frame_header + _encoded(_image(frame), "WEBP", lossless=True)[12:])

    def finish(self) -> None:
        length = self.file.tell()
        self.file.seek(4)
        self.file.write(struct.pack("<I", length - 8))
        super().finish()


class _Npz(_FileEncoder):
    """`frames` (N, H, W, C) and `fps`, uncompressed, as `numpy.savez` has them.

    The header of an array says how many frames follow, so they wait in a nameless file until that is known.
    """

    def begin(self) -> None:
        self.waiting = tempfile.TemporaryFile(dir=Path(self.file.name).parent)  # noqa: SIM115

    def write(self, frame: Frame) -> None:
        self.waiting.write(frame.tobytes())
        self.frames += 1

    def finish(self) -> None:
        shape = (self.frames, self.height, self.width, self.channels)
        self.waiting.seek(0)
        with zipfile.ZipFile(self.file, "w") as archive:
            with archive.open(zipfile.ZipInfo("frames.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
                shutil.copyfileobj(self.waiting, member, 1 << 20)
            with archive.open(zipfile.ZipInfo("fps.npy"), "w") as member:
                np.lib.format.write_array(member, np.array(self.fps, np.float64))
        self.abort()

    def abort(self) -> None:
        self.waiting.close()
        self.file.close()


class _Mp4:
    """H.264, 4:2:0, which plays everywhere; that needs even sizes, so an odd one repeats its last row or column."""

    def __init__(self, path: Path, fps: float, first: Frame) -> None:
        import av

        height, width, channels = first.shape
        self.pad = ((0, height % 2), (0, width % 2), (0, 0))
        self.format = "gray" if channels == 1 else "rgb24"
        self.container = av.open(str(path.absolute()), "w", format="mp4")
        self.stream: Any = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        self.stream.width, self.stream.height = width + width % 2, height + height % 2
        self.stream.pix_fmt = "yuv420p"
        self.stream.options = {"crf": MP4_QUALITY}

    def write(self, frame: Frame) -> None:
        import av

        padded = np.ascontiguousarray(np.pad(frame, self.pad, mode="edge"))
        if self.format == "gray":
            padded = padded[..., 0]
        for packet in self.stream.encode(av.VideoFrame.from_ndarray(padded, format=self.format)):
            self.container.mux(packet)

    def finish(self) -> None:
        for packet in self.stream.encode():
            self.container.mux(packet)
        self.container.close()

    def abort(self) -> None:
        self.container.close()


class _Folder:
    """frame-000000.png and so on."""

    def __init__(self, path: Path, fps: float, first: Frame) -> None:  # noqa: ARG002  (a folder has no rate)
        path.mkdir()
        self.path = path
        self.frames = 0

    def write(self, frame: Frame) -> None:
        (self.path / f"frame-{self.frames:06d}.png").write_bytes(_encoded(_image(frame), "PNG"))
        self.frames += 1

    def finish(self) -> None:
        """Every frame is a file already."""

    def abort(self) -> None:
        """Nothing is open."""


_ENCODERS: dict[str, Callable[[Path, float, Frame], _Encoder]] = {
    ".gif": _Gif,
    ".apng": _Apng,
    ".webp": _WebP,
    ".npz": _Npz,
    ".mp4": _Mp4,
    FOLDER: _Folder,
}
