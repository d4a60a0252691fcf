"""The user's own frames at the model's size, read once and kept on disk.

A clip may be longer than memory, and most of its frames are only copied to the result: no window looks at them. So the
fitted frames wait in a nameless file, one byte a value, and are read one by one when somebody asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from torch import Tensor

from fdm_cli.errors import BadInput
from fdm_cli.files import write_failures
from fdm_cli.video import fit, to_model
from fdm_cli.video_info import Frame

WHAT = "the temporary file of the clip"


class Clip:
    """Frames (C, H, W), float32 in [-1, 1], of one or several videos one after the other. To be used in a `with` block.

    Args:
        size: height and width of the model's frames.
        channels: 1 or 3.
        folder: where the file lies; the system's temporary folder may lie in memory.
    """

    def __init__(self, size: int, channels: int, folder: Path) -> None:
        self.size = size
        self.channels = channels
        self._shape = (size, size, channels)
        self._bytes = prod(self._shape)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by the `with` block)
        self._places: list[range] = []  # in the file, of the frames of each video, in their order

    def __enter__(self) -> Clip:
        """Closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forgets the frames."""
        with contextlib.suppress(OSError):  # of a disk that is full: that has been said
            self._file.close()

    def add(self, frames: Iterable[Frame], *, last: int | None = None, most: int | None = None) -> int:
        """Fits the frames of a video (`video.fit`) and appends them.

        Args:
            frames: uint8 `(H, W, C)` each, e.g. an open `Video`.
            last: keep only so many frames at the end; the file holds no more at any time.
            most: refuse more frames than this, all videos together, as soon as there are.

        Returns:
            how many frames of this video are kept.

        Raises:
            BadInput: more than `most` frames; whatever `frames` raises.
            RunFailed: the disk is full.
        """
        begin = len(self)
        count = 0
        for frame in frames:
            if most is not None and begin + min(count + 1, last or count + 1) > most:
                fewer = ", or --use-last" if most else ""
                raise BadInput(
                    f"more than {most} given frames, the whole video is to have {most + 1}", f"a larger --length{fewer}"
                )
            with write_failures(WHAT):
                self._file.seek((begin + count % (last or count + 1)) * self._bytes)
                self._file.write(fit(frame, self.size, self.channels).tobytes())
            count += 1
        with write_failures(WHAT):
            self._file.flush()
        if last is None or count <= last:
            self._places.append(range(begin, begin + count))
            return count
        oldest = count % last
        self._places += [range(begin + oldest, begin + last), range(begin, begin + oldest)]
        return last

    def __len__(self) -> int:
        return sum(map(len, self._places))

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for places in self._places:
            if index < len(places):
                break
            index -= len(places)
        self._file.seek(places[index] * self._bytes)
        frame = np.frombuffer(bytearray(self._file.read(self._bytes)), np.uint8).reshape(1, *self._shape)
        return to_model(frame)[0]

    def sha256(self) -> str:
        """A hash of all fitted frames in order: whether two clips are the same to the model."""
        digest = hashlib.sha256()
        for places in self._places:
            for place in places:
                self._file.seek(place * self._bytes)
                digest.update(self._file.read(self._bytes))
        return digest.hexdigest()

    def placed(self, positions: Sequence[int]) -> Mapping[int, Tensor]:
        """The frames by their places in a video: what `rollout.run` takes as given. ValueError: not one for each."""
        if len(positions) != len(self):
            raise ValueError(f"{len(positions)} places for {len(self)} frames")
        return _Placed(self, {position: index for index, position in enumerate(positions)})


class _Placed(Mapping[int, Tensor]):
    def __init__(self, clip: Clip, index_at: dict[int, int]) -> None:
        self._clip = clip
        self._index_at = index_at

    def __getitem__(self, position: int) -> Tensor:
        return self._clip[self._index_at[position]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._index_at)

    def __len__(self) -> int:
        return len(self._index_at)

    def __contains__(self, position: object) -> bool:
        return position in self._index_at
