"""Contact sheets: the frames of a video side by side in one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fdm_cli.files import refuse_taken, replacing
from fdm_cli.video_info import Frame

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SMALL, LARGE = 64, 256  # pixels; frames of a sheet are scaled by a whole number to stay between these where they can
MOST_FRAMES = 160  # of a sheet, unless the caller wants otherwise
COLUMNS = 16
GAP = 4  # pixels around each frame, where its border is drawn
LABEL_HEIGHT = 14
PAPER, INK = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class Marker:
    """The border of a frame: a colour, and dashed or not, so that it can be told without colours too."""

    colour: tuple[int, int, int]
    dashed: bool = False


OBSERVED = Marker((213, 94, 0))  # orange is observed and blue latent, as in the pictures of plans
LATENT = Marker((0, 114, 178), dashed=True)


def spread(frames: int, most: int = MOST_FRAMES) -> list[int]:
    """At most `most` of the positions 0 .. frames - 1, evenly from the first to the last."""
    if frames <= most:
        return list(range(frames))
    return [round(place * (frames - 1) / (most - 1)) for place in range(most)] if most > 1 else [0]


def contact_sheet(
    frames: Sequence[Frame],
    *,
    labels: Sequence[str] | None = None,
    markers: Sequence[Marker | None] | None = None,
    columns: int | None = None,
) -> Frame:
    """Frames in rows, from left to right.

    Tiny frames are enlarged by a whole number so that they can be seen; frames larger than 256 pixels are averaged down
    by one.

    Args:
        frames: uint8 `(H, W, C)` each, C 1 or 3, of one size; an array `(N, H, W, C)` is fine.
        labels: what stands over each frame, e.g. its number.
        markers: each frame's border; None draws none.
        columns: frames a row; 16 when not given.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        ValueError: no frames, or frames, labels and markers of different numbers.
    """
    from PIL import Image, ImageDraw, ImageFont

    count = len(frames)
    if count == 0 or len(labels or frames) != count or len(markers or frames) != count:
        raise ValueError(f"{count} frames, {len(labels or ())} labels, {len(markers or ())} markers")
    columns = min(count, columns or COLUMNS)
    tiles = [_tile(frame) for frame in frames]
    width, height = tiles[0].size
    top = GAP + (LABEL_HEIGHT if labels else 0)
    cell_width, cell_height = width + 2 * GAP, top + height + GAP
    sheet = Image.new("RGB", (columns * cell_width, -(-count // columns) * cell_height), PAPER)
    font = ImageFont.load_default(10)
    for index, tile in enumerate(tiles):
        cell = Image.new("RGB", (cell_width, cell_height), PAPER)  # of its own, so that a long label is cut
        draw = ImageDraw.Draw(cell)
        if labels:
            draw.text((GAP, 1), labels[index], INK, font)
        marker = markers[index] if markers else None
        if marker:
            _draw_border(draw, marker, (1, top - 3, GAP + width + 2, top + height + 2))
        cell.paste(tile, (GAP, top))
        sheet.paste(cell, (index % columns * cell_width, index // columns * cell_height))
    return np.array(sheet)


def write_png(path: str | Path, array: Frame, *, force: bool = False) -> None:
    """Writes a picture, uint8 `(H, W, 3)` or `(H, W, 1)`, as a PNG that is complete or not there.

    Raises:
        BadInput: `path` exists and `force` is not given, or its folder does not exist.
        RunFailed: it could not be written, e.g. because the disk is full.
    """
    from PIL import Image

    path = Path(path)
    refuse_taken(path, force)
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _tile(frame: Frame) -> Image.Image:
    """A frame as it stands on the sheet."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(frame[..., 0] if frame.shape[2] == 1 else frame)).convert("RGB")
    side = max(image.size)
    if side > LARGE:
        return image.reduce(-(-side // LARGE))
    scale = -(-SMALL // side)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _draw_border(draw: ImageDraw.ImageDraw, marker: Marker, box: tuple[int, int, int, int]) -> None:
    """Two pixels wide around the box (left, top, right, bottom), corners included."""
    left, top, right, bottom = box
    dash = 6 if marker.dashed else max(right - left, bottom - top) + 2
    for x in range(left, right + 1, 2 * dash):
        for y in (top, bottom - 1):
            draw.rectangle((x, y, min(x + dash - 1, right), y + 1), marker.colour)
    for y in range(top, bottom + 1, 2 * dash):
        for x in (left, right - 1):
            draw.rectangle((x, y, x + 1, min(y + dash - 1, bottom)), marker.colour)
