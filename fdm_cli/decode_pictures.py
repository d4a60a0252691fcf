"""GIF, APNG, WebP, JPEG, BMP -> frames.

The blocks of an animation are walked for its size and the durations of its frames; imageio decodes, and Pillow photos.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fdm_cli.errors import BadInput
from fdm_cli.video_info import (
    BACKGROUND,
    BROKEN,
    DEFAULT_FPS,
    MAX_ADDED_FRAMES,
    MAX_FRAME_PIXELS,
    MAX_PICTURE_FRAMES,
    MAX_PICTURE_PIXELS,
    MAX_PICTURE_WORK_A_BYTE,
    Frame,
    Video,
    VideoInfo,
    check_size,
    check_work,
    kind_of,
    take,
)

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class _Layout:
    """What the blocks of a picture file say. Durations in seconds; none for a still image."""

    width: int
    height: int
    durations: list[Fraction]
    grey: bool
    skip_first: bool = False  # an APNG's fallback image, which is no part of the animation
    deep: bool = False  # 16 bit grey
    hidden: int | None = None  # the level of such grey that is transparent


def open_picture(path: Path) -> Video:
    """A GIF, PNG, APNG or WebP, animated or not; raises as `video.read` does."""
    kind = kind_of(path)
    with path.open("rb") as file:
        layout = SCANNERS[kind](file, path)
    stored = max(1, len(layout.durations))
    check_size(path, layout.width, layout.height, stored, MAX_PICTURE_PIXELS)
    check_work(path, layout.width, layout.height, stored, MAX_PICTURE_WORK_A_BYTE)
    fps, repeats, remarks = _constant_rate(path, layout.durations)

    def decode() -> Iterator[Frame]:
        import imageio.v3 as iio

        # Absolute, since imageio takes a folder called ~ for the user's own.
        images = iio.imiter(path.absolute(), plugin="pillow", mode=None if layout.deep else "RGBA")
        if layout.skip_first:
            next(images)
        for image, repeat in zip(images, repeats, strict=False):
            if layout.hidden is not None:
                image[image == layout.hidden] = BACKGROUND << 8
            frame = flatten(image[: layout.height, : layout.width], grey=layout.grey)
            for _ in range(repeat):
                yield frame

    info = VideoInfo(
        path=path,
        kind=kind,
        frames=sum(repeats),
        height=layout.height,
        width=layout.width,
        channels=1 if layout.grey else 3,
        fps=fps,
        remarks=remarks,
    )
    return Video(info, decode)


def _constant_rate(path: Path, durations: list[Fraction]) -> tuple[float, list[int], tuple[str, ...]]:
    """Frames per second, how often to show each frame, and a remark, for frames that last `durations` seconds."""
    if len(durations) < 2:
        return (float(1 / durations[0]) if durations else DEFAULT_FPS), [1], ()
    if len(set(durations)) == 1:
        return float(1 / durations[0]), [1] * len(durations), ()
    tick, repeats = _rounded_tick(durations) or _common_tick(durations)
    total, stored = sum(repeats), len(repeats)
    if total - stored > MAX_ADDED_FRAMES or total > MAX_PICTURE_FRAMES:
        raise BadInput(
            f"{path}: its {stored} frames of differing durations make {total} on their common tick of "
            f"{float(1000 * tick):.4g} ms",
            f"give it a constant rate first: ffmpeg -i {path.name} -r 10 constant.mp4",
        )
    fps = float(1 / tick)
    if total == stored:
        return fps, repeats, ()
    return fps, repeats, (f"{stored} frames of differing durations, shown as {total} at {fps:.4g} fps",)


def _rounded_tick(durations: list[Fraction]) -> tuple[Fraction, list[int]] | None:
    """The tick of a constant rate that the file's unit of time does not hold, and how many of them each frame lasts.

    At 30 frames a second a GIF's frames last 30, 40, 30, ... ms. None where no tick fits to within a rounding.
    """
    rounding = Fraction(1, 100 if all(100 % duration.denominator == 0 for duration in durations) else 1000)
    least = min(durations)
    single = [duration for duration in durations if duration - least <= rounding]
    tick = sum(single, Fraction()) / len(single)
    repeats = [round(duration / tick) for duration in durations]  # of a frame that an encoder merged with its copies
    tick = sum(durations, Fraction()) / sum(repeats)
    fits = all(abs(duration - repeat * tick) < rounding for duration, repeat in zip(durations, repeats, strict=True))
    return (tick, repeats) if fits else None


def _common_tick(durations: list[Fraction]) -> tuple[Fraction, list[int]]:
    """The greatest common divisor of the durations, in hundredths of a second, and how many each frame lasts."""
    hundredths = [max(1, round(duration * 100)) for duration in durations]
    tick = math.gcd(*hundredths)
    return Fraction(tick, 100), [duration // tick for duration in hundredths]


def flatten(image: NDArray[Any], *, grey: bool) -> Frame:
    """RGBA `(H, W, 4)`, or 16-bit grey `(H, W)`, -> uint8 `(H, W, C)`, transparency composed onto the background."""
    if image.dtype == np.uint16:
        return (image >> 8).astype(np.uint8)[..., None]
    colour, alpha = image[..., : 1 if grey else 3], image[..., 3:]
    if not (alpha == 255).all():
        weight = alpha.astype(np.uint16)
        colour = ((colour * weight + BACKGROUND * (255 - weight) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(colour)


def _add_frame(durations: list[Fraction], path: Path, numerator: int, denominator: int) -> None:
    """Notes a frame of `numerator / denominator` seconds, as browsers show it; refuses the first frame too many."""
    if len(durations) == MAX_PICTURE_FRAMES:
        raise BadInput(f"{path}: claims more than {MAX_PICTURE_FRAMES} frames", "cut it first")
    durations.append(_browser_duration(numerator, denominator))


@lru_cache
def _browser_duration(numerator: int, denominator: int) -> Fraction:
    """Seconds; browsers slow down what asks for 10 ms a frame or less."""
    duration = Fraction(numerator, denominator)
    return duration if duration > Fraction(1, 100) else Fraction(1, 10)


def _scan_gif(file: IO[bytes], path: Path) -> _Layout:
    """Walks the blocks of a GIF (GIF89a specification)."""
    durations: list[Fraction] = []
    delay = reach_x = reach_y = 0

    def skip_table(flags: int) -> bool:
        table = file.read(3 * (2 << (flags & 7))) if flags & 0x80 else b""
        return table[0::3] == table[1::3] == table[2::3]

    def skip_sub_blocks() -> None:
        while length := file.read(1)[0]:
            file.seek(length, os.SEEK_CUR)

    width, height, flags, _, _ = take(file, "<6xHHBBB")
    grey = skip_table(flags)
    while (block := file.read(1)) not in (b"\x3b", b""):
        if block == b"\x21":
            if file.read(1) == b"\xf9":
                (delay,) = take(file, "<2xHx")
            skip_sub_blocks()
        elif block == b"\x2c":
            x, y, w, h, flags = take(file, "<HHHHB")
            reach_x, reach_y = max(reach_x, x + w), max(reach_y, y + h)
            grey = skip_table(flags) and grey
            file.seek(1, os.SEEK_CUR)
            skip_sub_blocks()
            _add_frame(durations, path, delay, 100)
            delay = 0
        elif block != b"\0":  # padding that some encoders leave
            raise ValueError(f"broken at byte {file.tell() - 1}")
    if not durations:
        raise BadInput(f"{path}: holds no frames", BROKEN)
    canvas = max(width, reach_x), max(height, reach_y)  # decoders enlarge it to this, for every frame
    check_size(path, *canvas, len(durations), MAX_PICTURE_PIXELS)
    check_work(path, *canvas, len(durations), MAX_PICTURE_WORK_A_BYTE)
    return _Layout(width, height, durations, grey)


def _scan_png(file: IO[bytes], path: Path) -> _Layout:
    """Walks the chunks of a PNG or APNG (W3C PNG specification, third edition)."""
    width, height, depth, colour_type = take(file, ">16xIIBB")
    durations: list[Fraction] = []
    position, skip_first, chunk = 8, False, b""
    grey = colour_type in (0, 4)
    deep, hidden = grey and depth == 16, None
    while chunk != b"IEND":
        file.seek(position)
        length, chunk = take(file, ">I4s")
        if (chunk == b"IHDR") != (position == 8):  # a decoder takes the last one
            raise ValueError(f"broken at byte {position}")
        if chunk == b"fcTL":
            numerator, denominator = take(file, ">20xHH")
            _add_frame(durations, path, numerator, denominator or 100)
        elif chunk == b"IDAT" and not durations:
            skip_first = True
        elif chunk == b"tRNS" and deep:
            (hidden,) = take(file, ">H")
        position += 12 + length
    if position > path.stat().st_size:
        raise BadInput(f"{path}: truncated", BROKEN)
    return _Layout(width, height, durations, grey, skip_first and bool(durations), deep, hidden)


def _scan_webp(file: IO[bytes], path: Path) -> _Layout:
    """Walks the chunks of a WebP (WebP container specification)."""
    (length,) = take(file, "<4xI4x")
    if length + 8 > path.stat().st_size:
        raise BadInput(f"{path}: truncated", BROKEN)
    width = height = 0
    durations: list[Fraction] = []
    position = 12
    while position + 8 <= length + 8:
        file.seek(position)
        chunk, size = take(file, "<4sI")
        if chunk == b"VP8X" and position != 12:
            raise ValueError(f"broken at byte {position}")
        if chunk == b"VP8X":
            sides = file.read(10)[4:]
            width, height = (1 + int.from_bytes(sides[at : at + 3], "little") for at in (0, 3))
        elif chunk == b"ANMF":
            _add_frame(durations, path, int.from_bytes(file.read(15)[12:], "little"), 1000)
        elif chunk == b"VP8 " and not width:
            width, height = (side & 0x3FFF for side in take(file, "<6xHH"))
        elif chunk == b"VP8L" and not width:
            (bits,) = take(file, "<xI")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        position += 8 + size + size % 2
    return _Layout(width, height, durations, grey=False)


SCANNERS: dict[str, Callable[[IO[bytes], Path], _Layout]] = {"GIF": _scan_gif, "PNG": _scan_png, "WebP": _scan_webp}


# By EXIF orientation, to show a photo upright. Pillow's `exif_transpose` also writes EXIF anew, which can fail.
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}  # fmt: skip


def open_photo(path: Path) -> Video:
    """A still image whose header Pillow reads: JPEG, turned upright by its EXIF, or BMP."""
    with _photo(path) as image:
        (width, height), grey = image.size, image.mode in ("L", "1")
        orientation = image.getexif().get(0x0112)
    check_size(path, width, height, 1, MAX_PICTURE_PIXELS)

    def decode() -> Iterator[Frame]:
        from PIL.Image import Transpose

        with _photo(path) as image:
            upright = image.convert("RGBA")
        if orientation in TURNS:
            upright = upright.transpose(Transpose[TURNS[orientation]])
        yield flatten(np.asarray(upright), grey=grey)

    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return Video(VideoInfo(path, kind_of(path), 1, height, width, 1 if grey else 3, DEFAULT_FPS), decode)


@contextmanager
def _photo(path: Path) -> Iterator[Image.Image]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its size is judged here
        try:
            with Image.open(path, formats=["JPEG", "BMP"]) as image:
                yield image
        except Image.DecompressionBombError:
            raise BadInput(f"{path}: larger than {MAX_FRAME_PIXELS / 1e6:.0f} million pixels") from None
