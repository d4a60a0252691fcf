"""Training clips from what `--data` names.

A source gives clips as a function of a generator and of the frames wanted, so that a training step reads
K frames of a clip of N, not N. Supported: the built-in moving digits, a user's IDX file of digits, and
arrays of clips (`.npy`, `.npz`). A source of another kind (a folder of videos) is one more class here.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fdm_cli import moving_mnist, video
from fdm_cli.config import Config
from fdm_cli.errors import BadInput
from fdm_cli.moving_mnist import MovingMnist

BUILT_IN = "moving-mnist"
Split = Literal["train", "held-out"]


class Clips(Protocol):
    """A source of clips of N frames, fitted to the model's size and channels."""

    @property
    def clip_length(self) -> int:
        """N, the number of frames of every clip."""

    def clip(self, generator: torch.Generator, frame_indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The frames (K,) of the clip that the generator draws, (K, H, W, C) uint8."""


@dataclass(frozen=True)
class ArrayClips:
    """Clips from an array of videos; a clip is a random window of N frames of a random video.

    Attributes:
        videos: (count, frames, H, W, C) uint8, possibly memory-mapped.
        image_size: H = W of the model.
        image_channels: 1 or 3.
        clip_length: N.
    """

    videos: NDArray[np.uint8]
    image_size: int
    image_channels: int
    clip_length: int

    def clip(self, generator: torch.Generator, frame_indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See Clips.clip."""
        which = int(torch.randint(len(self.videos), (), generator=generator))
        start = int(torch.randint(self.videos.shape[1] - self.clip_length + 1, (), generator=generator))
        return video.fit(self.videos[which][start + frame_indices], self.image_size, self.image_channels)


def open_clips(config: Config, split: Split = "train") -> Clips:
    """The clips that the configuration's `data.source` names.

    One tenth is held out, the last one: digits 9,000 to 9,999 of the built-in ones, the last tenth of a
    user's digits or videos (none of a single video, which is then both).

    Raises:
        BadInput: missing or unreadable source, clips shorter than `data.clip_length`.
    """
    data, model = config.data, config.model
    if data.source == BUILT_IN:
        return _digits(config, moving_mnist.built_in_digits(), split)
    path = Path(data.source).expanduser()
    if not path.exists():
        raise BadInput(f"no such file: {path}", f"--data takes a file, or {BUILT_IN!r} for the built-in digits")
    if path.is_dir():
        raise BadInput(f"{path} is a folder", "--data takes .npy or .npz clips, or an IDX file of digits")
    if path.suffix in (".npy", ".npz"):
        videos = _split(read_videos(path), split)
        if videos.shape[1] < data.clip_length:
            raise BadInput(
                f"{path}: its clips have {videos.shape[1]} frames, data.clip_length is {data.clip_length}",
                f"--set data.clip_length={videos.shape[1]}",
            )
        return ArrayClips(videos, model.image_size, model.image_channels, data.clip_length)
    if moving_mnist.is_idx(path):
        return _digits(config, moving_mnist.read_idx(path), split)
    raise BadInput(f"{path}: not a kind of data that is known", "known: .npy or .npz clips, an IDX file of digits")


def _digits(config: Config, digits: NDArray[np.uint8], split: Split) -> MovingMnist:
    data, model = config.data, config.model
    canvas = data.moving_mnist.canvas
    if canvas % model.image_size:
        raise BadInput(f"data.moving_mnist.canvas {canvas} is no multiple of model.image_size {model.image_size}")
    if max(digits.shape[1:]) > canvas:
        raise BadInput(f"digits of {digits.shape[1]} x {digits.shape[2]} do not fit on a canvas of {canvas}")
    return MovingMnist(
        _split(digits, split), data.moving_mnist, model.image_size, model.image_channels, data.clip_length
    )


def _split(items: NDArray[np.uint8], split: Split) -> NDArray[np.uint8]:
    """The last tenth is held out; of fewer than two items, all are both."""
    if len(items) < 2:
        return items
    boundary = len(items) - max(1, len(items) // 10)
    return items[:boundary] if split == "train" else items[boundary:]


def read_videos(path: Path) -> NDArray[np.uint8]:
    """An array file as (count, frames, H, W, C) uint8; a `.npy` is memory-mapped.

    Accepted shapes: (N, H, W) and (N, H, W, C) are one video; (count, N, H, W) and (count, N, H, W, C) are
    many; (20, count, 64, 64) with more clips than frames is the classic Moving MNIST file, frames first.
    C is 1 or 3. An NPZ holds one array, or one called `frames`.

    Raises:
        BadInput: unreadable, not uint8, or of another shape.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            names = loaded.files
            name = "frames" if "frames" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise BadInput(f"{path}: holds {len(names)} arrays", "call the one with the clips `frames`")
            array = loaded[name]
        else:
            array = loaded
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: cannot be read as an array: {' '.join(str(error).split())}") from None
    if array.dtype != np.uint8:
        raise BadInput(f"{path}: holds {array.dtype}, not uint8", "pixels are 0 to 255")
    if array.ndim == 4 and array.shape[0] == 20 and array.shape[2:] == (64, 64) and array.shape[1] > 20:
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
    return array
