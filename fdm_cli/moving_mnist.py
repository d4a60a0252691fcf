"""Moving MNIST made on the fly: handwritten digits that move straight and bounce off the walls.

Srivastava, Mansimov, Salakhutdinov, "Unsupervised Learning of Video Representations using LSTMs", 2015.
A clip is a function of its generator, so it can be any length, and only the frames asked for are drawn.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fdm_cli.config import MovingMnistConfig
from fdm_cli.errors import BadInput

IDX_IMAGES = 0x00000803  # unsigned bytes, three dimensions
MAX_IDX_BYTES = 1 << 30


def built_in_digits() -> NDArray[np.uint8]:
    """The 10,000 MNIST test digits that ship with the package, (10000, 28, 28) uint8."""
    with as_file(files("fdm_cli") / "assets" / "t10k-images-idx3-ubyte.gz") as path:
        return read_idx(path)


def is_idx(path: Path) -> bool:
    """Whether the file begins as an IDX file of images, gzip-compressed or not."""
    try:
        with _open(path) as file:
            return file.read(4) == struct.pack(">I", IDX_IMAGES)
    except (OSError, EOFError, zlib.error):
        return False


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Images (count, rows, columns) uint8 from an IDX file, `.gz` or not.

    Raises:
        BadInput: no IDX file of images, cut short, or larger than 1 GiB once unpacked.
    """
    try:
        with _open(path) as file:
            header = file.read(16)
            if len(header) < 16 or header[:4] != struct.pack(">I", IDX_IMAGES):
                raise BadInput(f"{path}: not an IDX file of images")
            count, rows, columns = struct.unpack(">III", header[4:])
            size = count * rows * columns
            if not 0 < size <= MAX_IDX_BYTES:
                raise BadInput(f"{path}: claims {count} images of {rows} x {columns}")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    if len(data) != size:
        raise BadInput(f"{path}: the header says {size} bytes of images, the file holds {min(len(data), size + 1)}")
    return np.frombuffer(data, np.uint8).reshape(count, rows, columns)


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")


@dataclass(frozen=True)
class MovingMnist:
    """Clips of digits that bounce on a square canvas, averaged down to the model's size.

    Attributes:
        digits: (count, rows, columns) uint8, the digits to choose from.
        config: canvas, number of digits, speed.
        image_size: H = W of the frames; the canvas is a whole multiple of it.
        image_channels: 1, or 3 equal ones.
        clip_length: N.
    """

    digits: NDArray[np.uint8]
    config: MovingMnistConfig
    image_size: int
    image_channels: int
    clip_length: int

    @property
    def longest(self) -> None:
        """See dataset.Clips.longest."""
        return None

    @property
    def shortest(self) -> None:
        """See dataset.Clips.shortest."""
        return None

    @property
    def videos(self) -> None:
        """See dataset.Clips.videos."""
        return None

    @property
    def places(self) -> None:
        """See dataset.Clips.places."""
        return None

    def of_length(self, clip_length: int) -> MovingMnist:
        """See dataset.Clips.of_length."""
        return replace(self, clip_length=clip_length)

    def clip(self, generator: torch.Generator, frame_indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The named frames of the clip that the generator stands for, (K, H, W, C) uint8.

        Start position and direction are uniform; positions are fractions of the free range, reflected at 0
        and 1; where digits overlap the brighter pixel wins.
        """
        count, canvas = self.config.digits, self.config.canvas
        which = torch.randint(len(self.digits), (count,), generator=generator).tolist()
        start = torch.rand(count, 2, generator=generator, dtype=torch.float64).numpy()
        angle = torch.rand(count, generator=generator, dtype=torch.float64).numpy() * 2 * math.pi
        velocity = self.config.speed * np.stack([np.sin(angle), np.cos(angle)], axis=1)

        rows, columns = self.digits.shape[1:]
        unfolded = (start + velocity * np.asarray(frame_indices)[:, None, None]) % 2  # (K, count, 2)
        position = np.minimum(unfolded, 2 - unfolded)  # a triangle wave: reflection at 0 and 1
        corner = np.rint(position * (canvas - rows, canvas - columns)).astype(np.int64)

        frames = np.zeros((len(frame_indices), canvas, canvas), np.uint8)
        for frame, corners in zip(frames, corner, strict=True):
            for digit, (top, left) in zip(which, corners, strict=True):
                area = frame[top : top + rows, left : left + columns]
                np.maximum(area, self.digits[digit], out=area)
        factor = canvas // self.image_size
        # Adding the factor^2 pictures of every factor-th pixel: ten times faster than a mean over blocks.
        total = np.zeros((len(frames), self.image_size, self.image_size), np.uint32)
        for top in range(factor):
            for left in range(factor):
                total += frames[:, top::factor, left::factor]
        small = np.rint(total / factor**2).astype(np.uint8)
        return np.repeat(small[..., None], self.image_channels, axis=-1)
