"""Files <-> frames: what a video file is, its frames one by one, and the way to the model and back.

This is the only place where uint8 and [-1, 1] meet. Axis letters: N frames, H height, W width, C channels
(1 grey, 3 colour). A frame is a uint8 array `(H, W, C)`.

Reading has two steps. Opening looks at headers only: what the file really is (by its first bytes, not by its
name), how large it claims to be, how long each frame lasts; whatever is broken, too large or not what it is called
is refused there, before any pixel is decoded. Iterating then decodes one frame after another, so memory does not
grow with the length of the video.
"""

from __future__ import annotations

import math
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fdm_cli.errors import BadInput, FdmError

if TYPE_CHECKING:
    import torch

Frame = NDArray[np.uint8]

MAX_FRAME_PIXELS = 40_000_000  # 8K is 33 million
MAX_PICTURE_FRAMES = 150_000  # of a GIF, APNG, WebP or a folder of images
MAX_PICTURE_PIXELS = 10**10  # of all frames of a GIF, APNG or WebP: minutes of decoding from a few hundred bytes
MAX_VIDEO_PIXELS = 10**12  # of all frames of an MP4 and its like: over an hour of 4K
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
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_DEMUXERS = {"MP4": "mov", "Matroska": "matroska", "AVI": "avi"}
_BROKEN = "the file is broken or incomplete; try to play it, download or export it again"


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
            raise BadInput(f"{info.path}: breaks at frame {count}: {_reason(error)}", _BROKEN) from error
        if count == 0 or (info.kind not in _DEMUXERS and info.frames is not None and count < info.frames):
            raise BadInput(f"{info.path}: ends after {count} frames of {info.frames or 'at least one'}", _BROKEN)


def probe(path: str | Path) -> VideoInfo:
    """What a video file or folder of images holds, from its headers. Raises as `read` does."""
    return read(path).info


def read(path: str | Path) -> Video:
    """Opens a video: GIF, APNG, WebP, MP4, MOV, MKV, WebM, AVI, NPY, NPZ, a single image or a folder of images.

    Frames of a GIF, APNG or WebP that last differently long are repeated on the clip's own shortest tick (the
    greatest common divisor of the durations, in hundredths of a second), so that the rate is constant and frames
    that an encoder merged come back. Durations under 20 ms count as 100 ms, as in browsers. Transparency is composed
    onto white. Frames of MP4 and its like come as they are stored, upright. An NPY or NPZ array is uint8 `(N, H, W)`
    or `(N, H, W, C)`.

    Raises:
        BadInput: missing, empty, truncated, not what its name says, unknown extension, too large to decode,
            durations that would expand to too many frames. Iterating raises it too, naming the frame.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise BadInput(f"no such file: {path}")
        return _OPENERS[_kind(path)](path)
    except (FdmError, MemoryError):
        raise
    except PermissionError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:
        raise BadInput(f"{path}: cannot be read: {_reason(error)}", _BROKEN) from error


def fit(frames: Frame, size: int, channels: int) -> Frame:
    """Frames at the model's size and channels: centre crop to a square, then averaged down or interpolated up.

    Downwards each pixel is the mean of the area it covers; upwards interpolation is bicubic. Grey is the luma of
    ITU-R 601; colour from grey repeats it. Frames that already fit are returned unchanged.

    Args:
        frames: uint8 `(..., H, W, C)`, C 1 or 3.
        size: height and width of the result.
        channels: 1 or 3.

    Returns:
        uint8 `(..., size, size, channels)`.
    """
    from PIL import Image

    *batch, height, width, had = frames.shape
    if (height, width, had) == (size, size, channels):
        return frames
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cropped = frames[..., top : top + side, left : left + side, :].reshape(-1, side, side, had)
    fitted = np.empty((len(cropped), size, size, channels), np.uint8)
    resample = Image.Resampling.BOX if size <= side else Image.Resampling.BICUBIC
    for frame, out in zip(cropped, fitted, strict=True):
        image = Image.fromarray(np.ascontiguousarray(frame[..., 0] if had == 1 else frame))
        if channels == 1 and had == 3:
            image = image.convert("L")
        resized = np.asarray(image.resize((size, size), resample))
        out[:] = resized[..., None] if resized.ndim == 2 else resized
    return fitted.reshape(*batch, size, size, channels)


def describe_fit(info: VideoInfo, size: int, channels: int) -> str:
    """One line that says what `fit` does to this video, and what is left out of it."""
    colour = {1: "grey", 3: "colour"}
    done = []
    if info.height != info.width:
        done.append("centre crop")
    if (info.height, info.width, info.channels) != (size, size, channels):
        done.append(f"{size}x{size} {colour[channels]}")
    was = f"{info.path.name}: {info.width}x{info.height} {colour[info.channels]} {info.fps:.4g} fps"
    line = f"{was} -> {', '.join(done) or 'unchanged'}"
    return line + "".join(f"; {remark}" for remark in info.remarks) + ("; sound dropped" if info.has_sound else "")


def to_model(frames: Frame) -> torch.Tensor:
    """uint8 `(N, H, W, C)` -> float32 `(N, C, H, W)` in [-1, 1]."""
    import torch

    # By numpy, which takes one thread: batches are made beside a training step that uses all of torch's.
    levels = np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).astype(np.float32)
    return torch.from_numpy(levels / np.float32(127.5) - np.float32(1.0))


def to_uint8(frames: torch.Tensor) -> Frame:
    """`(N, C, H, W)` in [-1, 1] -> uint8 `(N, H, W, C)`: rounded to nearest, clamped; undoes `to_model` exactly."""
    import torch

    levels = frames.detach().float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())


def _reason(error: Exception) -> str:
    """A decoder's own words in one line; numpy and struct say things that help nobody, so those are replaced."""
    if isinstance(error, struct.error | IndexError | EOFError):
        return "it ends too early"
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:200] or type(error).__name__


# What a file is, and how large.


def _kind(path: Path) -> str:
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
    if found != KINDS[suffix] and not {found, KINDS[suffix]} <= set(_DEMUXERS):
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


def _check_size(path: Path, width: int, height: int, frames: int, most_pixels: int) -> None:
    """Refuses what would take unreasonable memory or time to decode, by what its header claims."""
    if width < 1 or height < 1:
        raise BadInput(f"{path}: its frames are {width}x{height}", _BROKEN)
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


# GIF, APNG, WebP: their blocks are walked for size and durations, imageio decodes.


@dataclass(frozen=True)
class _Layout:
    """What the blocks of a picture file say. Durations in seconds; none for a still image."""

    width: int
    height: int
    durations: list[Fraction]
    grey: bool
    skip_first: bool = False  # an APNG's fallback image, which is no part of the animation
    deep: bool = False  # 16 bit grey


def _open_picture(path: Path) -> Video:
    kind = _kind(path)
    with path.open("rb") as file:
        layout = _SCANNERS[kind](file, path)
    stored = max(1, len(layout.durations))
    _check_size(path, layout.width, layout.height, stored, MAX_PICTURE_PIXELS)
    fps, repeats, remarks = _constant_rate(path, layout.durations)

    def decode() -> Iterator[Frame]:
        import imageio.v3 as iio

        images = iio.imiter(path, plugin="pillow", mode=None if layout.deep else "RGBA")
        if layout.skip_first:
            next(images)
        for image, repeat in zip(images, repeats, strict=False):
            frame = _flatten(image[: layout.height, : layout.width], grey=layout.grey)
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
    hundredths = [max(2, round(duration * 100)) for duration in durations]
    tick = math.gcd(*hundredths)
    repeats = [duration // tick for duration in hundredths]
    total, stored = sum(repeats), len(repeats)
    if total - stored > MAX_ADDED_FRAMES or total > MAX_PICTURE_FRAMES:
        raise BadInput(
            f"{path}: its {stored} frames of differing durations make {total} on their common tick of {tick * 10} ms",
            "give its frames equal durations first",
        )
    if total == stored:
        return 100 / tick, repeats, ()
    return 100 / tick, repeats, (f"{stored} frames of differing durations, shown as {total} at {100 / tick:.4g} fps",)


def _flatten(image: NDArray[Any], *, grey: bool) -> Frame:
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
    """Seconds; browsers slow down what asks for less than 20 ms a frame."""
    duration = Fraction(numerator, denominator)
    return duration if duration >= Fraction(2, 100) else Fraction(1, 10)


def _take(file: IO[bytes], form: str) -> tuple[Any, ...]:
    """The next bytes of a file as `struct` reads them; struct.error at its end."""
    return struct.unpack(form, file.read(struct.calcsize(form)))


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

    width, height, flags, _, _ = _take(file, "<6xHHBBB")
    grey = skip_table(flags)
    while (block := file.read(1)) not in (b"\x3b", b""):
        if block == b"\x21":
            if file.read(1) == b"\xf9":
                (delay,) = _take(file, "<2xHx")
            skip_sub_blocks()
        elif block == b"\x2c":
            x, y, w, h, flags = _take(file, "<HHHHB")
            reach_x, reach_y = max(reach_x, x + w), max(reach_y, y + h)
            grey = skip_table(flags) and grey
            file.seek(1, os.SEEK_CUR)
            skip_sub_blocks()
            _add_frame(durations, path, delay, 100)
            delay = 0
        elif block != b"\0":  # padding that some encoders leave
            raise ValueError(f"broken at byte {file.tell() - 1}")
    if not durations:
        raise BadInput(f"{path}: holds no frames", _BROKEN)
    _check_size(path, reach_x, reach_y, 1, MAX_PICTURE_PIXELS)  # decoders enlarge the canvas to this
    return _Layout(width, height, durations, grey)


def _scan_png(file: IO[bytes], path: Path) -> _Layout:
    """Walks the chunks of a PNG or APNG (W3C PNG specification, third edition)."""
    width, height, depth, colour_type = _take(file, ">16xIIBB")
    durations: list[Fraction] = []
    position, skip_first, chunk = 8, False, b""
    while chunk != b"IEND":
        file.seek(position)
        length, chunk = _take(file, ">I4s")
        if chunk == b"fcTL":
            numerator, denominator = _take(file, ">20xHH")
            _add_frame(durations, path, numerator, denominator or 100)
        elif chunk == b"IDAT" and not durations:
            skip_first = True
        position += 12 + length
    if position > path.stat().st_size:
        raise BadInput(f"{path}: truncated", _BROKEN)
    grey = colour_type in (0, 4)
    return _Layout(width, height, durations, grey, skip_first and bool(durations), grey and depth == 16)


def _scan_webp(file: IO[bytes], path: Path) -> _Layout:
    """Walks the chunks of a WebP (WebP container specification)."""
    (length,) = _take(file, "<4xI4x")
    if length + 8 > path.stat().st_size:
        raise BadInput(f"{path}: truncated", _BROKEN)
    width = height = 0
    durations: list[Fraction] = []
    position = 12
    while position + 8 <= length + 8:
        file.seek(position)
        chunk, size = _take(file, "<4sI")
        if chunk == b"VP8X":
            sides = file.read(10)[4:]
            width, height = (1 + int.from_bytes(sides[at : at + 3], "little") for at in (0, 3))
        elif chunk == b"ANMF":
            _add_frame(durations, path, int.from_bytes(file.read(15)[12:], "little"), 1000)
        elif chunk == b"VP8 " and not width:
            width, height = (side & 0x3FFF for side in _take(file, "<6xHH"))
        elif chunk == b"VP8L" and not width:
            (bits,) = _take(file, "<xI")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        position += 8 + size + size % 2
    return _Layout(width, height, durations, grey=False)


_SCANNERS: dict[str, Callable[[IO[bytes], Path], _Layout]] = {"GIF": _scan_gif, "PNG": _scan_png, "WebP": _scan_webp}


# JPEG, BMP, folders of images.


def _open_photo(path: Path) -> Video:
    """A still image whose header Pillow reads: JPEG, turned upright by its EXIF, or BMP."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its size is judged here
        try:
            with Image.open(path, formats=["JPEG", "BMP"]) as image:
                (width, height), grey = image.size, image.mode in ("L", "1")
                turned = image.getexif().get(0x0112, 1) >= 5
        except Image.DecompressionBombError:
            raise BadInput(f"{path}: larger than {MAX_FRAME_PIXELS / 1e6:.0f} million pixels") from None
    _check_size(path, width, height, 1, MAX_PICTURE_PIXELS)

    def decode() -> Iterator[Frame]:
        import imageio.v3 as iio

        yield _flatten(iio.imread(path, plugin="pillow", mode="RGBA", rotate=True), grey=grey)

    if turned:
        width, height = height, width
    return Video(VideoInfo(path, _kind(path), 1, height, width, 1 if grey else 3, DEFAULT_FPS), decode)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder in natural order (frame-2 before frame-10); hidden and other files are left out."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."]
    return sorted(files, key=lambda file: natural_order(file.name))


def natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key that sorts names as people do: frame-2 before frame-10, upper case among lower case."""
    parts = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def _open_folder(folder: Path) -> Video:
    files = image_files(folder)
    if not files:
        raise BadInput(f"{folder}: a folder without images", f"its frames must be {', '.join(IMAGE_SUFFIXES)} files")
    if len(files) > MAX_PICTURE_FRAMES:
        raise BadInput(f"{folder}: holds {len(files)} images; at most {MAX_PICTURE_FRAMES} are read")
    grey = True
    first: VideoInfo | None = None
    for file in files:
        info = read(file).info
        first = first or info
        if (info.height, info.width) != (first.height, first.width):
            raise BadInput(
                f"{file}: {info.width}x{info.height}, but {first.path.name} is {first.width}x{first.height}",
                "the images of a folder are the frames of one video and must have one size",
            )
        grey = grey and info.channels == 1
    assert first is not None  # noqa: S101  (files is not empty)

    def decode() -> Iterator[Frame]:
        for file in files:
            frame = next(iter(read(file)))
            yield frame if grey or frame.shape[2] == 3 else np.repeat(frame, 3, axis=2)

    info = replace(first, path=folder, kind="folder", frames=len(files), channels=1 if grey else 3, fps=DEFAULT_FPS)
    return Video(replace(info, remarks=()), decode)


# MP4, MOV, Matroska, WebM, AVI: libav decodes.


def _open_container(path: Path) -> Video:
    import av

    kind = _kind(path)
    with path.open("rb") as file:
        if _is_truncated(kind, file, path.stat().st_size):
            raise BadInput(f"{path}: truncated", _BROKEN)

    def open_container() -> Any:
        return av.open(str(path.absolute()), format=_DEMUXERS[kind])

    with open_container() as container:
        if not container.streams.video:
            raise BadInput(f"{path}: holds no pictures", "it has sound only")
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise BadInput(f"{path}: does not say its frame rate", _BROKEN)
        seconds = container.duration / av.time_base if container.duration else 0
        _check_size(path, stream.width, stream.height, stream.frames or math.ceil(seconds * rate), MAX_VIDEO_PIXELS)
        first = next(_upright(container, grey=False), None)
        if first is None:
            raise BadInput(f"{path}: holds no frames", _BROKEN)
        grey = stream.codec_context.pix_fmt.startswith("gray")
        info = VideoInfo(
            path=path,
            kind=kind,
            frames=stream.frames or None,
            height=first.shape[0],
            width=first.shape[1],
            channels=1 if grey else 3,
            fps=float(rate),
            has_sound=bool(container.streams.audio),
        )

    def decode() -> Iterator[Frame]:
        with open_container() as container:
            yield from _upright(container, grey=grey)

    return Video(info, decode)


def _upright(container: Any, *, grey: bool) -> Iterator[Frame]:
    """The frames of the first video stream, turned as the camera was held."""
    container.streams.video[0].thread_type = "AUTO"
    for frame in container.decode(video=0):
        image = frame.to_ndarray(format="gray" if grey else "rgb24")
        image = image[..., None] if grey else image
        yield np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90))) if frame.rotation else image


def _is_truncated(kind: str, file: IO[bytes], held: int) -> bool:
    """Whether a container's outermost lengths reach over the `held` bytes of its file; libav would just stop there."""
    if kind == "AVI":
        return bool(_take(file, "<4xI")[0] + 8 > held)
    position: int = 0
    while position < held:
        file.seek(position)
        if kind == "MP4":
            length: int = _take(file, ">I4x")[0]
            if length == 1:
                length = _take(file, ">Q")[0]
            if length < 8:  # 0: the box reaches to the end of the file
                return length != 0
            position += length
        else:
            _vint(file)
            size = _vint(file)
            if size is None:  # a live recording, which does not say
                return False
            position = file.tell() + size
    return position > held


def _vint(file: IO[bytes]) -> int | None:
    """A Matroska number of variable length; None where all its bits are set: unknown."""
    first = file.read(1)
    more = 8 - first[0].bit_length()
    mask = (1 << 7 * (more + 1)) - 1
    number = int.from_bytes(first + file.read(more), "big") & mask
    return None if number == mask else number


# NPY and NPZ.


def _array_info(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], fps: float) -> VideoInfo:
    if dtype != np.uint8 or len(shape) not in (3, 4) or (*shape, 1)[3] not in (1, 3):
        raise BadInput(
            f"{path}: holds {dtype} {shape}, not a video",
            "a video is uint8 (frames, height, width) or (frames, height, width, 1 or 3)",
        )
    if shape[0] == 0:
        raise BadInput(f"{path}: holds no frames")
    _check_size(path, shape[2], shape[1], 1, MAX_PICTURE_PIXELS)
    return VideoInfo(path, KINDS[path.suffix.lower()], shape[0], shape[1], shape[2], (*shape, 1)[3], fps)


def _open_npy(path: Path) -> Video:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    info = _array_info(path, array.shape, array.dtype, DEFAULT_FPS)

    def decode() -> Iterator[Frame]:
        for frame in array:
            yield np.array(frame).reshape(info.height, info.width, info.channels)

    return Video(info, decode)


def _open_npz(path: Path) -> Video:
    """The array `frames` (or the only one) of an NPZ, read frame by frame out of the zip, and `fps` if there."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name != "fps.npy"]
        member = "frames.npy" if "frames.npy" in names else names[0] if len(names) == 1 else None
        if member is None:
            raise BadInput(f"{path}: holds no array 'frames'", f"it holds {', '.join(names) or 'nothing'}"[:200])
        fps = DEFAULT_FPS
        if "fps.npy" in archive.namelist() and archive.getinfo("fps.npy").file_size < 4096:
            with archive.open("fps.npy") as file:
                fps = float(np.lib.format.read_array(file, allow_pickle=False))
        with archive.open(member) as file:
            shape, fortran, dtype = _array_header(file)
            held = archive.getinfo(member).file_size - file.tell()
    info = _array_info(path, shape, dtype, fps)
    if not (math.isfinite(fps) and fps > 0):
        raise BadInput(f"{path}: its rate is {fps} frames per second")
    if fortran:
        raise BadInput(f"{path}: its array is in Fortran order", "save numpy.ascontiguousarray(frames)")
    frame_bytes = info.height * info.width * info.channels
    if held != frame_bytes * shape[0]:
        raise BadInput(f"{path}: holds {held} bytes of frames where {shape} needs {frame_bytes * shape[0]}", _BROKEN)

    def decode() -> Iterator[Frame]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            _array_header(file)
            for _ in range(shape[0]):
                data = file.read(frame_bytes)
                yield np.frombuffer(data, np.uint8).reshape(info.height, info.width, info.channels)

    return Video(info, decode)


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and type of the array whose .npy bytes begin here."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


_OPENERS: dict[str, Callable[[Path], Video]] = {
    **dict.fromkeys(_SCANNERS, _open_picture),
    **dict.fromkeys(("JPEG", "BMP"), _open_photo),
    **dict.fromkeys(_DEMUXERS, _open_container),
    "NPY": _open_npy,
    "NPZ": _open_npz,
}
