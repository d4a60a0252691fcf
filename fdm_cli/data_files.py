"""What `--data` names: the video files of a folder, in a stable order, and the videos that each of them holds.

Finding looks at names, sizes and times only; opening looks at headers; iterating decodes.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fdm_cli import video
from fdm_cli.decode_arrays import npz_contents
from fdm_cli.errors import BadInput, FdmError, RunFailed
from fdm_cli.files import PASSING, write_failures
from fdm_cli.video_info import (
    DEFAULT_FPS,
    KINDS,
    LONG_WORK,
    MAX_ARRAY_WORK_A_BYTE,
    MAX_PICTURE_PIXELS,
    Video,
    VideoInfo,
    check_size,
    check_work,
)

ARRAYS = (".npy", ".npz")
CLASSIC = (20, 10_000, 64, 64)  # of the Moving MNIST test set, as it is passed on
MAX_UNPACKED = 64 << 30  # bytes of an NPZ; a few megabytes can claim as much


@dataclass(frozen=True)
class DataFiles:
    """The files of a data set, before any of them is opened.

    Attributes:
        root: the folder, or the one file.
        files: every file with a known extension, in natural order of the path (clip-2 before clip-10).
        ignored: how many other files there are; hidden ones do not count.
    """

    root: Path
    files: tuple[Path, ...]
    ignored: int = 0

    def relative(self, path: Path) -> str:
        """The name of a file within the data set, the same wherever the folder lies."""
        return path.name if path == self.root else path.relative_to(self.root).as_posix()


@dataclass(frozen=True)
class Source:
    """What holds videos: one file, or the images of one folder, which are the frames of one video.

    Attributes:
        path: the file or the folder.
        files: what it is read from.
    """

    path: Path
    files: tuple[Path, ...]


def find(root: Path) -> DataFiles:
    """Looks for videos and images in a folder and all folders in it; a file is itself.

    Hidden files and folders are left out, and what `fdm train` itself may have written there: run folders and sheets.
    Links to folders are followed, each folder is looked into once.

    Raises:
        BadInput: a folder that cannot be read.
    """
    if not root.is_dir():
        return DataFiles(root, (root,))
    found: list[Path] = []
    ignored = 0
    seen: set[Path] = set()
    folders: list[Path] = [root]
    links: list[Path] = []  # come last, and all in one order: a folder keeps its own name
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            if folder.resolve() in seen or _is_run(folder):
                continue
            seen.add(folder.resolve())
            entries = {entry: entry.is_dir() for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")}
        except OSError as error:
            raise BadInput(f"cannot read {folder}: {error.strerror or error}") from None
        for entry, is_folder in entries.items():
            if is_folder:
                (links if entry.is_symlink() else folders).append(entry)
            elif entry.suffix.lower() in KINDS and not video.is_sheet(entry.name):
                found.append(entry)
            else:
                ignored += 1
    found.sort(key=lambda file: [video.natural_order(part) for part in file.relative_to(root).parts])
    return DataFiles(root, tuple(found), ignored)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def sources(data: DataFiles) -> list[Source]:
    """Groups files into what holds videos, in their order.

    The images of one folder are the frames of one video, unless one of them is an animation: then each image is a
    video of its own. A single file is always its own.
    """
    if data.files == (data.root,):
        return [Source(data.root, data.files)]
    images: dict[Path, list[Path]] = {}
    for file in data.files:
        if file.suffix.lower() in video.IMAGE_SUFFIXES:
            images.setdefault(file.parent, []).append(file)
    frames = {folder: tuple(files) for folder, files in images.items() if not any(map(_is_animation, files))}
    grouped: dict[Path, Source] = {}
    for file in data.files:
        if file.suffix.lower() in video.IMAGE_SUFFIXES and file.parent in frames:
            grouped.setdefault(file.parent, Source(file.parent, frames[file.parent]))
        else:
            grouped[file] = Source(file, (file,))
    return list(grouped.values())


def _is_animation(file: Path) -> bool:
    if file.suffix.lower() not in (".png", ".webp"):
        return False
    try:
        return video.probe(file).frames != 1
    except BadInput as error:
        refuse_passing(error, file)
        return False


def refuse_passing(error: BadInput | OSError, path: Path) -> None:
    """Raises RunFailed for what may be readable the next time: what is left out of a cache is left out for good."""
    cause = error.__cause__ if isinstance(error, BadInput) else error
    if isinstance(cause, OSError) and cause.errno in PASSING:
        hint = "once it can be read, the same command does; or take the file away"
        raise RunFailed(f"cannot read {path}: {cause.strerror}", hint) from None


def open_videos(source: Source, scratch: Path) -> Iterator[Video]:
    """The videos of one source: one, or as many as an array of clips holds.

    Args:
        source: a file or a folder of images.
        scratch: a file name where an NPZ may be unpacked; the caller deletes it.

    Raises:
        BadInput: as `video.read`.
        RunFailed: no space to unpack an NPZ.
    """
    if source.path.suffix.lower() not in ARRAYS or source.path.is_dir():
        yield video.read(source.path)
        return
    array, fps = read_array(source.path, scratch)
    _, frames, height, width, channels = array.shape
    info = VideoInfo(source.path, KINDS[source.path.suffix.lower()], frames, height, width, channels, fps)
    for clip in array:
        yield Video(info, partial(map, np.asarray, clip))


def read_array(path: Path, scratch: Path) -> tuple[NDArray[np.uint8], float]:
    """The clips of an array file, memory-mapped, and their frames per second.

    Accepted shapes: (N, H, W) and (N, H, W, C) are one video; (count, N, H, W) and (count, N, H, W, C) are
    many; CLASSIC is the Moving MNIST file of that shape, frames first.
    C is 1 or 3. An NPZ holds one array, or one called `frames`, and perhaps `fps`.

    Returns:
        (count, N, H, W, C) uint8 and the rate.

    Raises:
        BadInput: unreadable, not uint8, or of another shape.
        RunFailed: no space to unpack an NPZ.
    """
    fps = DEFAULT_FPS
    try:
        if path.suffix.lower() == ".npz":
            fps = _unpack(path, scratch)
        array = np.load(path if path.suffix.lower() == ".npy" else scratch, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise BadInput(f"{path}: holds an NPZ file, not an NPY file", "rename it to .npz")
    except (FdmError, MemoryError):
        raise
    except Exception as error:  # zipfile, its decompressors and numpy have many
        raise BadInput(f"{path}: cannot be read as an array: {' '.join(str(error).split())}") from error
    if array.dtype != np.uint8:
        raise BadInput(f"{path}: holds {array.dtype}, not uint8", "pixels are 0 to 255")
    if array.shape == CLASSIC:  # nothing else, since twenty clips of 64 x 64 look like a part of it
        array = array.swapaxes(0, 1)
    if array.ndim in (3, 4) and not (array.ndim == 4 and array.shape[-1] in (1, 3)):
        array = array[..., None]
    if array.ndim == 4:
        array = array[None]
    if array.ndim != 5 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise BadInput(
            f"{path}: shape {array.shape} is no set of clips",
            "(N, H, W), (N, H, W, C), (clips, N, H, W) or (clips, N, H, W, C), with C 1 or 3",
        )
    count, frames, height, width, _ = array.shape
    check_size(path, width, height, 1, MAX_PICTURE_PIXELS)
    if path.suffix.lower() == ".npz":
        check_work(path, width, height, count * frames, MAX_ARRAY_WORK_A_BYTE)
    return array, fps


def _unpack(path: Path, scratch: Path) -> float:
    """Writes the array of clips in an NPZ to `scratch`, piece by piece; returns the frames per second."""
    with zipfile.ZipFile(path) as archive:
        name, fps = npz_contents(archive, path)
        if archive.getinfo(name).file_size > MAX_UNPACKED:
            raise BadInput(
                f"{path}: unpacks to more than {MAX_UNPACKED >> 30} GiB",
                "save the array as .npy, which needs no unpacking",
            )
        size, free = archive.getinfo(name).file_size, shutil.disk_usage(scratch.parent).free
        if size > max(LONG_WORK, MAX_ARRAY_WORK_A_BYTE * path.stat().st_size):
            raise BadInput(f"{path}: {path.stat().st_size} bytes claim to unpack to {size}, which is no real video")
        if size > free:
            raise RunFailed(f"no space left to unpack {path}: {size} bytes, {free} are free", "see FDM_CACHE")
        with archive.open(name) as member, scratch.open("wb") as file:
            while piece := member.read(1 << 20):
                with write_failures(scratch):
                    file.write(piece)
    return fps
