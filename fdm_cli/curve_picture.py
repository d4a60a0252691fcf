"""Curves as a picture: numbers over training steps on a logarithmic scale, or over frames on a linear one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fdm_cli.ticks import round_step
from fdm_cli.video_info import Frame

WIDTH, HEIGHT = 900, 520
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 44, 52  # margins; TOP with one line of names, each further one takes LINE more
LINE = 20
PAPER, INK, GRID = (255, 255, 255), (40, 44, 52), (225, 228, 233)
FONT_SIZE = 15


@dataclass(frozen=True)
class Curve:
    """A line of the picture.

    Attributes:
        name: what it shows.
        points: (x, y), x ascending; y that is not finite, or on a logarithmic scale not positive, leaves a gap.
        colour: of the line.
        dots: draw each point too, for few of them.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: tuple[int, int, int]
    dots: bool = False


def draw(curves: Sequence[Curve], x_name: str, y_name: str = "", *, linear: bool = False) -> Frame:
    """Curves over a common x axis; (520, 900, 3) uint8. Without any point the axes stand alone.

    Args:
        curves: all of them.
        x_name: stands under the axis.
        y_name: stands over the picture, before the names of the curves.
        linear: else y is logarithmic.
    """
    least = -math.inf if linear else 0.0
    points = [[(x, y) if least < y < math.inf else None for x, y in curve.points] for curve in curves]
    known = [point for line in points for point in line if point]
    x_low, x_high = min((x for x, _ in known), default=0), max((x for x, _ in known), default=1)
    y_low, y_high = min((y for _, y in known), default=0.1), max((y for _, y in known), default=1)
    x_high = max(x_high, x_low + 1)
    if linear:
        edge = 0.05 * (y_high - y_low) or 0.1
        low, high, ticks = y_low - edge, y_high + edge, _ticks(y_low - edge, y_high + edge, least=0)
    else:
        low, high = math.log10(y_low) - 0.05, math.log10(y_high) + 0.05
        ticks = _log_ticks(low, high)

    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(FONT_SIZE)
    names = _place_names(curves, y_name, font)
    top = TOP + LINE * max((line for line, _ in names), default=0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = ((y if linear else math.log10(y)) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - top - BOTTOM)

    for y in ticks:
        _, row = place(x_low, y)
        canvas.line((LEFT, row, WIDTH - RIGHT, row), GRID)
        canvas.text((LEFT - 8, row), f"{y:.6g}", INK, font, anchor="rm")
    for x in _ticks(x_low, x_high):
        column, _ = place(x, y_low)
        canvas.line((column, top, column, HEIGHT - BOTTOM), GRID)
        canvas.text((column, HEIGHT - BOTTOM + 8), f"{x:g}" if x < 1e6 else f"{x / 1e6:g}M", INK, font, anchor="mt")
    canvas.rectangle((LEFT, top, WIDTH - RIGHT, HEIGHT - BOTTOM), outline=INK)
    canvas.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8), x_name, INK, font, anchor="mb")
    canvas.text((LEFT, 22), y_name, INK, font, anchor="lm")
    for curve, points_of_curve, (line, column) in zip(curves, points, names, strict=True):
        _draw_line(canvas, curve, [place(*point) if point else None for point in points_of_curve])
        row = 22 + LINE * line
        canvas.line((column, row, column + 24, row), curve.colour, 3)
        canvas.text((column + 32, row), curve.name, INK, font, anchor="lm")
    return np.array(image)


def _place_names(curves: Sequence[Curve], y_name: str, font: Any) -> list[tuple[int, float]]:
    """Line and column where each curve's name begins, after the picture's own: as many lines as it takes."""
    places: list[tuple[int, float]] = []
    line = 0
    column = LEFT + (font.getlength(y_name) + 32 if y_name else 0.0)
    for curve in curves:
        width = 32 + font.getlength(curve.name)
        if places and column + width > WIDTH - RIGHT:
            line, column = line + 1, float(LEFT)
        places.append((line, column))
        column += width + 32
    return places


def _draw_line(canvas: ImageDraw.ImageDraw, curve: Curve, places: Sequence[tuple[float, float] | None]) -> None:
    stretch: list[tuple[float, float]] = []
    for here in [*places, None]:
        if here is not None:
            stretch.append(here)
            continue
        if len(stretch) > 1:
            canvas.line(stretch, curve.colour, 2)
        elif stretch and not curve.dots:
            canvas.point(stretch, curve.colour)
        stretch = []
    for here in places if curve.dots else ():
        if here is not None:
            x, y = here
            canvas.ellipse((x - 3, y - 3, x + 3, y + 3), curve.colour)


def _ticks(low: float, high: float, least: float = 1.0) -> list[float]:
    """Four to ten round numbers within [low, high], at least `least` apart; whole ones unless that is less than 1."""
    step = max(least, round_step((high - low) / 8 or 1))
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers y with low <= log10(y) <= high: as many as fit well."""
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), tuple(n / 20 for n in range(20, 200))):
        ticks = [
            digit * 10.0**power
            for power in range(math.floor(low), math.ceil(high) + 1)
            for digit in digits
            if low <= math.log10(digit) + power <= high
        ]
        if len(ticks) >= 4:
            break
    return ticks[:: -(-len(ticks) // 12)]
