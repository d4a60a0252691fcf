"""What a file of frames is: its kind, its size, how much of it is read, and the way to its frames.

The decoders (`decode_*.py`) open files of one kind each; `video.py` picks the decoder.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fdm_cli.errors import BadInput, FdmError

Frame = NDArray[np.uint8]

MAX_FRAME_PIXELS = 40_000_000  # 8K is 33 million
MAX_PICTURE_FRAMES = 150_000  # of a GIF, APNG, WebP or a folder of images
MAX_PICTURE_PIXELS = 10**10  # of all frames of a GIF, APNG or WebP: minutes of decoding
MAX_VIDEO_PIXELS = 10**12  # of all frames of an MP4 and its like: over an hour of 4K
# What takes more than some ten seconds to read must be a file of some size: a still screen, recorded for minutes, has
# 10,000 pixels a byte, a black video in an NPZ 1,000 and what one of its frames costs beside its pixels.
LONG_WORK = 300_000_000  # pixels, and FRAME_WORK for each frame
FRAME_WORK = 1_000
MAX_PICTURE_WORK_A_BYTE = 20_000
MAX_ARRAY_WORK_A_BYTE = 2_500
MAX_ADDED_FRAMES = 10_000  # by expanding frames of differing durations onto one tick
DEFAULT_FPS = 10.0  # of what holds no rate: a folder, an .npy, a single image
BACKGROUND = 255  # under transparent pixels: white, as a web page shows them

KINDS = {
    ".gif": "GIF",
    ".png": "PNG",
    ".apng": "PNG",
    ".webp": "WebP",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".mp4": "MP4",
    ".m4v": "MP4",
    ".mov": "MP4",
    ".mkv": "Matroska",
    ".webm": "Matroska",
    ".avi": "AVI",
    ".npy": "NPY",
    ".npz": "NPZ",
}
DEMUXERS = {"MP4": "mov", "Matroska": "matroska", "AVI": "avi"}
BROKEN = "the file is broken or incomplete; try to play it, download or export it again"


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before it is decoded.

    Attributes:
        path: the file, or the folder of images.
        kind: what it is by its content, e.g. "GIF".
        frames: how many frames iterating yields, or None where the container does not say; for MP4 and its like
            it is what the header claims.
        height, width: of every frame, in pixels, upright.
        channels: of every frame, 1 (grey) or 3.
        fps: frames per second.
        has_sound: there is a sound track (which is never read).
        remarks: what the user should know about how the file is read, a line each.
    """

    path: Path
    kind: str
    frames: int | None
    height: int
    width: int
    channels: int
    fps: float
    has_sound: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Video:
    """A video that is open for reading; iterating decodes it from the start, each time anew.

    Attributes:
        info: what the headers say.
        decode: opens the file and yields its frames, uint8 `(H, W, C)`; use iteration instead, which turns
            whatever a decoder raises into BadInput.
    """

    info: VideoInfo
    decode: Callable[[], Iterator[Frame]]

    def __iter__(self) -> Iterator[Frame]:
        """Yields uint8 `(H, W, C)` frames; BadInput, naming the frame, where the file breaks."""
        info, count = self.info, 0
        shape = (info.height, info.width, info.channels)
        try:
            for frame in self.decode():
                if frame.shape != shape:
                    raise ValueError(f"it is {frame.shape}, the first one {shape}")
                yield frame
                count += 1
        except (FdmError, MemoryError):
            raise
        except Exception as error:
            raise BadInput(f"{info.path}: breaks at frame {count}: {reason(error)}", BROKEN) from error
        if count == 0 or (info.kind not in DEMUXERS and info.frames is not None and count < info.frames):
            raise BadInput(f"{info.path}: ends after {count} frames of {info.frames or 'at least one'}", BROKEN)


def kind_of(path: Path) -> str:
    """The kind of a file by its first bytes, which must agree with its extension."""
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise BadInput(
            f"{path}: unsupported kind of file {suffix!r}",
            f"supported: {', '.join(KINDS)}, or a folder of images",
        )
    if not path.is_file():
        raise BadInput(f"{path}: not a regular file")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise BadInput(f"{path}: empty file", "nothing was written to it; download or export it again")
    found = _sniff(head)
    if found is None:
        raise BadInput(f"{path}: not a {KINDS[suffix]} file", "its content is something else, whatever its name says")
    if found != KINDS[suffix] and not {found, KINDS[suffix]} <= set(DEMUXERS):
        right = next(suffix for suffix, kind in KINDS.items() if kind == found)
        raise BadInput(f"{path}: holds a {found} file, not a {KINDS[suffix]} file", f"rename it to {right}")
    return found


def _sniff(head: bytes) -> str | None:
    """The kind of a file that begins with these 16 bytes, or None."""
    signatures = (
        (0, rb"GIF8[79]a", "GIF"),
        (0, rb"\x89PNG\r\n\x1a\n", "PNG"),
        (0, rb"RIFF....WEBP", "WebP"),
        (0, rb"RIFF....AVI ", "AVI"),
        (0, rb"\xff\xd8\xff", "JPEG"),
        (0, rb"BM", "BMP"),
        (4, rb"ftyp|moov|mdat|wide|free|skip", "MP4"),
        (0, rb"\x1a\x45\xdf\xa3", "Matroska"),
        (0, rb"\x93NUMPY", "NPY"),
        (0, rb"PK\x03\x04", "NPZ"),
    )
    for offset, pattern, kind in signatures:
        if re.match(pattern, head[offset:], re.DOTALL):
            return kind
    return None


def check_size(path: Path, width: int, height: int, frames: int, most_pixels: int) -> None:
    """Refuses what would take unreasonable memory or time to decode, by what its header claims."""
    if width < 1 or height < 1:
        raise BadInput(f"{path}: its frames are {width}x{height}", BROKEN)
    if width * height > MAX_FRAME_PIXELS:
        raise BadInput(
            f"{path}: claims frames of {width}x{height}; at most {MAX_FRAME_PIXELS / 1e6:.0f} million pixels are read",
            "scale it down first, the model sees small frames anyway",
        )
    if width * height * frames > most_pixels:
        raise BadInput(
            f"{path}: claims {frames} frames of {width}x{height}; at most {most_pixels:.0e} pixels in all are read",
            "cut it or scale it down first",
        )


def check_work(path: Path, width: int, height: int, frames: int, most_a_byte: int) -> None:
    """Refuses a small file that would take minutes to decode: nobody's video, whatever it claims."""
    work = frames * (width * height + FRAME_WORK)
    if work > max(LONG_WORK, most_a_byte * path.stat().st_size):
        raise BadInput(
            f"{path}: {path.stat().st_size} bytes claim {frames} frames of {width}x{height}, which is no real video",
            "if it is one, cut it or scale it down first",
        )


def reason(error: Exception) -> str:
    """A decoder's own words in one line; numpy and struct say things that help nobody, so those are replaced."""
    if isinstance(error, struct.error | IndexError | EOFError):
        return "it ends too early"
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:200] or type(error).__name__


def take(file: IO[bytes], form: str) -> tuple[Any, ...]:
    """The next bytes of a file as `struct` reads them; struct.error at its end."""
    return struct.unpack(form, file.read(struct.calcsize(form)))
