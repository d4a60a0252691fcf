"""Files <-> frames: what a video file is, its frames one by one, and the way to the model and back.

This is the only place where uint8 and [-1, 1] meet. Axis letters: N frames, H height, W width, C channels
(1 grey, 3 colour). A frame is a uint8 array `(H, W, C)`.

Reading has two steps. Opening looks at headers: what the file really is (by its first bytes, not by its name),
how large it claims to be, how long each frame lasts; whatever is broken, too large or not what it is called is
refused there, before any pixel is decoded (of a container then one frame, for its colours). Iterating then decodes
one frame after another, so memory does not grow with the length of the video.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fdm_cli import decode_arrays, decode_containers, decode_pictures
from fdm_cli.errors import BadInput, FdmError
from fdm_cli.video_info import (
    BROKEN,
    DEFAULT_FPS,
    DEMUXERS,
    MAX_PICTURE_FRAMES,
    Frame,
    Video,
    VideoInfo,
    kind_of,
    reason,
)

if TYPE_CHECKING:
    import torch

TRAINING_SHEET, VIDEO_SHEET = ".clips.png", ".sheet.png"  # what is drawn beside data and videos; never frames
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def probe(path: str | Path) -> VideoInfo:
    """What a video file or folder of images holds, from its headers. Raises as `read` does."""
    return read(path).info


def read(path: str | Path) -> Video:
    """Opens a video: GIF, APNG, WebP, MP4, MOV, MKV, WebM, AVI, NPY, NPZ, a single image or a folder of images.

    Frames of a GIF, APNG or WebP that last differently long are repeated on the clip's own shortest tick, so that the
    rate is constant and frames that an encoder merged come back: the tick of which all durations are multiples to
    within the rounding of the file's unit of time, else their greatest common divisor in hundredths of a second.
    Durations of 10 ms or less count as 100 ms, as in browsers. Transparency is composed
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
        return _OPENERS[kind_of(path)](path)
    except (FdmError, MemoryError):
        raise
    except PermissionError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:
        raise BadInput(f"{path}: cannot be read: {reason(error)}", BROKEN) from error


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


def image_files(folder: Path) -> list[Path]:
    """The images of a folder in natural order (frame-2 before frame-10), without hidden files and sheets."""
    files = [
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "." and not is_sheet(file.name)
    ]
    return sorted(files, key=lambda file: natural_order(file.name))


def is_sheet(name: str) -> bool:
    """Whether a file is a contact sheet of this program's."""
    return name.endswith((TRAINING_SHEET, VIDEO_SHEET))


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
        if info.frames != 1:
            raise BadInput(f"{file}: an animation among the images of a folder", "name the file itself")
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


_OPENERS: dict[str, Callable[[Path], Video]] = {
    **dict.fromkeys(decode_pictures.SCANNERS, decode_pictures.open_picture),
    **dict.fromkeys(("JPEG", "BMP"), decode_pictures.open_photo),
    **dict.fromkeys(DEMUXERS, decode_containers.open_container),
    "NPY": decode_arrays.open_npy,
    "NPZ": decode_arrays.open_npz,
}
