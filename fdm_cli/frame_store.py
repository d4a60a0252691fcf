"""The frames of a rollout by their index and sample, on disk: memory holds only those that are being worked on.

A long video's frames may have to wait for each other (keyframes wait for all that lies between them), and an
interrupted rollout has to find again what it made. So every frame goes to a file as soon as it is clean, float32 as it
left the sampler, and is read when a stage observes it or when its turn to be written has come. Plain reads and
writes, not a memory map: mapped pages would count as the process's own memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fdm_cli.files import sync


class FrameStore:
    """Frames (C, H, W), float32 in [-1, 1], of S samples.

    Args:
        shape: (C, H, W).
        samples: S, the videos that are made side by side.
        given: frame index -> (C, H, W), which all samples share, or (S, C, H, W), one for each; asked for a frame
            whenever it is wanted, so it may read it from somewhere.
        path: the file, kept and used again; None is a temporary one that nobody sees.
        scratch: the folder of the temporary one; None is the system's for such files, which may lie in memory.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        samples: int,
        given: Mapping[int, Tensor],
        path: Path | None = None,
        scratch: Path | None = None,
    ) -> None:
        self._shape = shape
        self._samples = samples
        self._given = given
        self._path = path
        self._bytes = 4 * prod(shape)
        if path is None:
            self._file = tempfile.TemporaryFile(buffering=0, dir=scratch)  # noqa: SIM115  (closed by `__exit__`)
        else:
            path.touch()
            self._file = FileIO(path, "r+b")

    def __enter__(self) -> FrameStore:
        """Closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self._file.close()

    def get(self, index: int, sample: int) -> Tensor:
        """One frame of one sample, (C, H, W): given, or made by now (else its content means nothing)."""
        if index in self._given:
            frame = self._given[index]
            return frame if frame.dim() == 3 else frame[sample]
        return self._read(index, sample, 1)[0]

    def get_all(self, index: int) -> Tensor:
        """One frame of every sample, (S, C, H, W)."""
        if index in self._given:
            return self._given[index].expand(self._samples, *self._shape)
        return self._read(index, 0, self._samples)

    def put(self, index: int, sample: int, frame: Tensor) -> None:
        """Keeps a frame that has become clean, (C, H, W). Raises OSError when the disk is full."""
        rest = frame.contiguous().numpy().data.cast("B")
        self._seek(index, sample)
        while rest:
            rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Flushes what was written to the disk."""
        if self._path is not None:
            sync(self._path)

    def _read(self, index: int, sample: int, count: int) -> Tensor:
        """(count, C, H, W), samples in a row; zeros where the file is too short."""
        frames = torch.zeros(count, *self._shape)
        rest = frames.numpy().data.cast("B")
        self._seek(index, sample)
        while rest and (read := self._file.readinto(rest)):
            rest = rest[read:]
        return frames

    def _seek(self, index: int, sample: int) -> None:
        self._file.seek((index * self._samples + sample) * self._bytes)
