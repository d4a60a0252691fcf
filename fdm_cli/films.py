"""The samples of a rollout as files: one each or all in one grid, enlarged if asked for, with contact sheets."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from fdm_cli import montage, picture
from fdm_cli.files import allow_open_files
from fdm_cli.video_info import Frame
from fdm_cli.video_writer import open_writer

_OTHER_FILES = 64  # that are open besides those of the videos, at most two each
_SHEETS_BYTES = 2**28  # that the frames on all sheets may take: many samples show fewer of them


class Films:
    """Writes the frames of S samples side by side; the files appear when the `with` block ends without an exception.

    They take the place of files of these names: whether they may is for the caller to ask.

    Args:
        paths: a file for each sample; with `grid` one for all.
        fps: frames per second, as asked for.
        shape: (N, H, W), how many frames will come and of what size.
        samples: S.
        grid: all samples in one video.
        scale: pixels that a pixel becomes in each direction.
        sheets: contact sheets, PNG, one for each of `paths`; none when empty.
        folder: where unfinished files lie, on the same disk; None is beside `paths`.

    Attributes:
        fps: the rate that the files really have.
        size: the (height, width) that the files really have, known after the first frame.
        remarks: lines that the user should see, known after the first frame.

    Raises:
        BadInput: as `video_writer.open_writer`; more videos than files may be open at once.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        fps: float,
        *,
        shape: tuple[int, int, int],
        samples: int = 1,
        grid: bool = False,
        scale: int = 1,
        sheets: Sequence[Path] = (),
        folder: Path | None = None,
    ) -> None:
        frames, height, width = shape
        if grid:
            height, width = montage.grid_size(samples, height, width)
        size = (height * scale, width * scale)
        allow_open_files(2 * len(paths) + _OTHER_FILES)
        self._writers = [open_writer(path, fps, frames=frames, size=size, force=True, folder=folder) for path in paths]
        self._grid = grid
        self._scale = scale
        self._sheets = sheets
        # The shown frames of all samples wait in memory until the end.
        most = max(1, min(picture.MOST_FRAMES, _SHEETS_BYTES // (samples * 3 * math.prod(shape[1:]))))
        self._shown = set(picture.spread(frames, most)) if sheets else set()
        self._on_sheet: list[list[Frame]] = [[] for _ in sheets]
        self._written = 0
        self._stack = contextlib.ExitStack()
        self.fps = self._writers[0].fps

    def __enter__(self) -> Films:
        """Nothing is opened before the first frame."""
        for writer in self._writers:
            self._stack.enter_context(writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the files and draws the sheets, or removes what was written."""
        self._stack.__exit__(kind, error, trace)
        if error is None:
            labels = [str(number) for number in sorted(self._shown)]
            for path, shown in zip(self._sheets, self._on_sheet, strict=True):
                picture.write_png(path, picture.contact_sheet(shown, labels=labels), force=True)

    def write(self, samples: Frame) -> None:
        """The next frame of every sample, uint8 `(S, H, W, C)`."""
        pictures = [montage.grid(samples)] if self._grid else list(samples)
        for number, (writer, frame) in enumerate(zip(self._writers, pictures, strict=True)):
            if self._written in self._shown:
                self._on_sheet[number].append(frame)
            writer.write(montage.enlarge(frame, self._scale))
        self._written += 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the files."""
        return self._writers[0].size

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines that the user should see."""
        return self._writers[0].remarks
