"""Several videos in one, frame by frame, and pixels that become squares."""

from __future__ import annotations

import math

import numpy as np

from fdm_cli.video_info import Frame

GAP = 1  # pixels between the videos of a grid, before they are enlarged
PAPER = 128  # between them, and where the last row is not full


def columns_of(count: int) -> int:
    """How many of `count` videos stand in a row: up to three in one, else rows and columns as near as can be."""
    return count if count < 4 else math.ceil(math.sqrt(count))


def grid_size(count: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a grid of `count` videos."""
    columns = columns_of(count)
    return -(-count // columns) * (height + GAP) - GAP, columns * (width + GAP) - GAP


def grid(frames: Frame) -> Frame:
    """One frame of each video -> one frame with all of them, in rows from left to right.

    Args:
        frames: uint8 `(S, H, W, C)`, any S from 1 on.

    Returns:
        uint8 `(*grid_size(S, H, W), C)`; a grey line stands between neighbours.
    """
    count, height, width, channels = frames.shape
    columns = columns_of(count)
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + GAP, width + GAP, channels), PAPER, np.uint8)
    cells[:count, :height, :width] = frames
    rowwise = cells.reshape(rows, columns, height + GAP, width + GAP, channels).transpose(0, 2, 1, 3, 4)
    return rowwise.reshape(rows * (height + GAP), columns * (width + GAP), channels)[:-GAP, :-GAP]


def enlarge(frame: Frame, scale: int) -> Frame:
    """Each pixel of `(H, W, C)` becomes `scale` x `scale` pixels: nothing is smoothed."""
    return frame if scale == 1 else frame.repeat(scale, axis=0).repeat(scale, axis=1)
