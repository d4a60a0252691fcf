"""Round numbers for the axes of pictures and timelines."""

from __future__ import annotations

import math


def round_step(least: float) -> float:
    """The least of ..., 0.5, 1, 2, 5, 10, 20, 50, ... that is at least the number, which is positive."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
