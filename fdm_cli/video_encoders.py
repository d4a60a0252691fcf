"""Frames -> the bytes of a file, one encoder a format.

GIF, APNG and WebP share one idea: Pillow encodes every frame as a picture of its own, and the compressed part of that
picture is wrapped as the next frame of the animation. So each frame is on disk before the next one comes, every
frame is kept (an encoder that sees the whole video merges identical ones), and memory does not grow.
"""

from __future__ import annotations

import io
import shutil
import struct
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from fdm_cli.errors import RunFailed
from fdm_cli.video_info import Frame

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "a folder of PNG images"
WEBP_BYTES = 2**32 - 64
MP4_QUALITY = "10"  # x264's constant rate factor: 0 is lossless, 23 its default, visible on tiny frames


class Encoder(Protocol):
    """Made with the temporary path, the rate and the first frame, which says the size."""

    def write(self, frame: Frame) -> None:
        """Encodes one frame, uint8 `(H, W, C)`."""

    def finish(self) -> None:
        """Completes and closes the file."""

    def abort(self) -> None:
        """Closes it as it is."""


def _image(frame: Frame) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(frame[..., 0] if frame.shape[2] == 1 else frame))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """One image as the bytes of a file of its own."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class _FileEncoder(ABC):
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

    @abstractmethod
    def begin(self) -> None:
        """Writes what comes before the first frame."""

    @abstractmethod
    def write(self, frame: Frame) -> None:
        """Adds a frame."""

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


def apng_delay(fps: float) -> Fraction:
    """Seconds a frame as a fraction of two 16-bit numbers."""
    delay = (1 / Fraction(fps).limit_denominator(1001)).limit_denominator(65535)
    return delay if delay.numerator <= 65535 else Fraction(round(delay))


class _Apng(_FileEncoder):
    """Lossless. The number of frames stands at the file's beginning and is filled in at the end."""

    def begin(self) -> None:
        self.delay = apng_delay(self.fps)
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
        if self.file.tell() + len(body) > WEBP_BYTES:
            raise RunFailed("a WebP file holds less than 4 GiB", "--output names an MP4 or NPZ file instead")
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
        self.waiting = tempfile.TemporaryFile(dir=Path(self.file.name).parent)  # noqa: SIM115  (closed by `abort`)

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
        self.stream.codec_context.thread_count = 1  # each thread keeps frames, and there may be many videos at once

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


ENCODERS: dict[str, Callable[[Path, float, Frame], Encoder]] = {
    ".gif": _Gif,
    ".apng": _Apng,
    ".webp": _WebP,
    ".npz": _Npz,
    ".mp4": _Mp4,
    FOLDER: _Folder,
}
