"""A plan as a picture for a page: frames across, windows down.

The colours are apart in grey print too: dark blue generated, orange observed, light grey known.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fdm_cli.plan import Plan
from fdm_cli.ticks import round_step

UNKNOWN = (244, 245, 247)
KNOWN = (205, 210, 216)
CANDIDATE = (250, 224, 184)
OBSERVED = (242, 156, 48)
LATENT = (28, 74, 138)
_INK = (40, 44, 52)
_PAPER = (255, 255, 255)

_WIDTH = 1280
_MOST_ROWS = 480
_HEIGHT = 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 64, 64, 48
_FONT_SIZE = 15


def draw(plan: Plan) -> NDArray[np.uint8]:
    """The picture of a plan, (H, W, 3).

    Of a plan with more than 480 windows, every second, fifth, tenth... has a row; of a long video, each column
    stands for several frames.
    """
    per_column = max(1, -(-plan.length // (_WIDTH // 2)))
    columns = -(-plan.length // per_column)
    rows = _thinned(plan.calls, _MOST_ROWS)
    wide = max(2, min(36, _WIDTH // columns))
    high = max(2, min(16, _HEIGHT // max(len(rows), 1)))
    classes = _classes(plan, rows, per_column, columns)
    palette = np.array([UNKNOWN, KNOWN, CANDIDATE, OBSERVED, LATENT], np.uint8)
    cells = palette[classes].repeat(high, axis=0).repeat(wide, axis=1)
    if wide >= 5:
        cells[:, wide - 1 :: wide] = _PAPER
    if high >= 5:
        cells[high - 1 :: high] = _PAPER
    waves = ImageFont.load_default(_FONT_SIZE).getlength(f"{max(plan.waves - 1, 0):,}")
    width = max(cells.shape[1], 620) + _LEFT + max(_RIGHT, int(waves) + 24)
    canvas = np.full((cells.shape[0] + _TOP + _BOTTOM, width, 3), _PAPER, np.uint8)
    canvas[_TOP : _TOP + cells.shape[0], _LEFT : _LEFT + cells.shape[1]] = cells
    return _label(canvas, plan, rows, per_column, wide, high)


def _classes(plan: Plan, rows: range, per_column: int, columns: int) -> NDArray[np.uint8]:
    """What each column of frames is to each shown stage, and to a first row that shows the given frames."""
    padded = np.full(columns * per_column, np.iinfo(np.int32).max, np.int32)
    padded[: plan.length] = plan.makers
    makers = padded.reshape(columns, per_column).min(axis=1)
    has_given = bool(plan.given)
    classes = np.zeros((len(rows) + has_given, columns), np.uint8)
    if has_given:
        classes[0][makers < 0] = 1
    for row, index in zip(classes[has_given:], rows, strict=True):
        stage = plan.stages[index]
        row[makers < index] = 1
        observed: Iterable[int] = stage.observed or ()
        if stage.choice is not None:
            row[makers < stage.choice.among] = 2
            observed = stage.choice.always
        row[[frame // per_column for frame in observed]] = 3
        row[[frame // per_column for frame in stage.latent]] = 4
    return classes


def _label(
    canvas: NDArray[np.uint8], plan: Plan, rows: range, per_column: int, wide: int, high: int
) -> NDArray[np.uint8]:
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT_SIZE)
    windows = "1 window" if plan.calls == 1 else f"{plan.calls:,} windows"
    waves = "1 wave" if plan.waves == 1 else f"{plan.waves:,} waves"
    title = f"{plan.scheme}: {plan.length:,} frames, window {plan.window}, {windows} in {waves}"
    if per_column > 1:
        title += f"; a column is {per_column:,} frames"
    if rows.step > 1:
        title += f"; one row for {rows.step:,} windows"
    pen.text((_LEFT, 8), title, fill=_INK, font=font)
    pen.text((_LEFT - 8, _TOP - 6), "frame", fill=_INK, font=font, anchor="rs")
    for frame in _thinned(plan.length, 12):
        x = _LEFT + frame // per_column * wide + wide // 2
        pen.text((x, _TOP - 6), f"{frame:,}", fill=_INK, font=font, anchor="ms")
        pen.line([(x, _TOP - 4), (x, _TOP - 1)], fill=_INK)
    first = high if plan.given else 0
    if plan.given:
        pen.text((_LEFT - 8, _TOP + high // 2), "given", fill=_INK, font=font, anchor="rm")
    right = canvas.shape[1] - 12
    pen.text((right, _TOP - 6), "wave", fill=_INK, font=font, anchor="rs")
    for count in range(0, len(rows), int(round_step(-(-(_FONT_SIZE + 3) // high)))):
        y = max(_TOP + first + count * high + high // 2, _TOP + 7)
        label = f"{rows[count]:,}" if count else f"window {rows[0]}"
        pen.text((_LEFT - 8, y), label, fill=_INK, font=font, anchor="rm")
        pen.text((right, y), f"{plan.stages[rows[count]].wave:,}", fill=_INK, font=font, anchor="rm")
    entries = [("generated", LATENT), ("observed", OBSERVED), ("known", KNOWN), ("unknown", UNKNOWN)]
    if any(plan.stages[index].choice is not None for index in rows):
        entries.insert(2, ("may be observed", CANDIDATE))
    left, y = float(_LEFT), canvas.shape[0] - 26
    for text, colour in entries:
        pen.rectangle([(left, y), (left + 13, y + 13)], fill=colour, outline=_INK if colour == UNKNOWN else colour)
        pen.text((left + 20, y + 7), text, fill=_INK, font=font, anchor="lm")
        left += 20 + pen.textlength(text, font=font) + 24
    return np.asarray(image)


def _thinned(count: int, most: int) -> range:
    """Numbers from 0 on, about `most` of them: every one, or every second, fifth, tenth..."""
    return range(0, count, int(round_step(max(1, -(-count // most)))))
