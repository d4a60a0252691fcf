"""NPY and NPZ -> frames, one by one."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from fdm_cli.errors import BadInput
from fdm_cli.video_info import (
    BROKEN,
    DEFAULT_FPS,
    KINDS,
    MAX_ARRAY_WORK_A_BYTE,
    MAX_PICTURE_PIXELS,
    Frame,
    Video,
    VideoInfo,
    check_size,
    check_work,
)


def _array_info(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], fps: float) -> VideoInfo:
    if dtype != np.uint8 or len(shape) not in (3, 4) or (*shape, 1)[3] not in (1, 3):
        raise BadInput(
            f"{path}: holds {dtype} {shape}, not a video",
            "a video is uint8 (frames, height, width) or (frames, height, width, 1 or 3)",
        )
    if shape[0] == 0:
        raise BadInput(f"{path}: holds no frames")
    check_size(path, shape[2], shape[1], 1, MAX_PICTURE_PIXELS)
    return VideoInfo(path, KINDS[path.suffix.lower()], shape[0], shape[1], shape[2], (*shape, 1)[3], fps)


def open_npy(path: Path) -> Video:
    """An NPY array, memory-mapped; raises as `video.read` does."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    info = _array_info(path, array.shape, array.dtype, DEFAULT_FPS)

    def decode() -> Iterator[Frame]:
        for frame in array:
            yield np.array(frame).reshape(info.height, info.width, info.channels)

    return Video(info, decode)


def npz_contents(archive: zipfile.ZipFile, path: Path) -> tuple[str, float]:
    """The name in the zip of the array with the frames, `frames` or the only one, and the frames per second.

    Raises:
        BadInput: no such array, or a rate that is none.
    """
    names = [name for name in archive.namelist() if name != "fps.npy"]
    member = "frames.npy" if "frames.npy" in names else names[0] if len(names) == 1 else None
    if member is None:
        raise BadInput(
            f"{path}: holds no array 'frames' and {len(names)} others",
            f"call the one with the frames `frames`; it holds {', '.join(names) or 'nothing'}"[:200],
        )
    fps = DEFAULT_FPS
    if "fps.npy" in archive.namelist() and archive.getinfo("fps.npy").file_size < 4096:
        with archive.open("fps.npy") as file:
            shape, _, dtype = _array_header(file)
        if math.prod(shape) != 1 or dtype.kind not in "iuf":  # before it is read: a header may claim any size
            raise BadInput(f"{path}: its fps is no number but {dtype} of shape {shape}")
        with archive.open("fps.npy") as file:
            fps = float(np.lib.format.read_array(file, allow_pickle=False).item())
    if not (math.isfinite(fps) and fps > 0):
        raise BadInput(f"{path}: its rate is {fps} frames per second")
    return member, fps


def open_npz(path: Path) -> Video:
    """The array `frames` (or the only one) of an NPZ, read frame by frame out of the zip, and `fps` if there."""
    with zipfile.ZipFile(path) as archive:
        member, fps = npz_contents(archive, path)
        with archive.open(member) as file:
            shape, fortran, dtype = _array_header(file)
            held = archive.getinfo(member).file_size - file.tell()
    info = _array_info(path, shape, dtype, fps)
    if fortran:
        raise BadInput(f"{path}: its array is in Fortran order", "save numpy.ascontiguousarray(frames)")
    frame_bytes = info.height * info.width * info.channels
    if held != frame_bytes * shape[0]:
        raise BadInput(f"{path}: holds {held} bytes of frames where {shape} needs {frame_bytes * shape[0]}", BROKEN)
    check_work(path, info.width, info.height, shape[0], MAX_ARRAY_WORK_A_BYTE)

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
