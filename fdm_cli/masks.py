"""Which frames of a training clip the network sees, which of them are observed and which latent.

The training distribution of FDM (arXiv 2205.11495, algorithm 3 of the appendix): groups of evenly spaced
frames; the first group is latent, each further one observed or latent with even odds. `filled` is the same
without padding; `continued` mixes it with windows whose first frames are observed and whose others follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Masks = Literal["paper", "filled", "continued"]

DRAWS_AT_ONCE = 64  # a call of torch for each number would take longer than the rest


@dataclass(frozen=True)
class WindowMasks:
    """K frames of a clip and their roles; frames that are neither observed nor latent are padding.

    Attributes:
        frame_indices: (K,) int64, positions in the clip, each at most once.
        observed: (K,) bool.
        latent: (K,) bool; disjoint from `observed`, at least one is set.
    """

    frame_indices: Tensor
    observed: Tensor
    latent: Tensor


def sample_masks(clip_length: int, window: int, generator: torch.Generator, masks: Masks = "paper") -> WindowMasks:
    """Draws one training window from a clip of N frames.

    Groups are drawn one after another; frames that are taken already drop out of a new group. What happens to the
    first group that has more new frames than there are free places is where `paper` and `filled` differ:

    - `paper`: it is thrown away and the window is done. Padding fills the free places: other frames of the clip,
      drawn uniformly, which take part in nothing but the statistics of the normalisations.
    - `filled`: it gives as many of its new frames as there are free places, neighbours within the group, the first of
      them drawn uniformly, in the role that it has drawn like every other group. So every place is observed or latent.

    `continued` gives, with even odds, a window of `filled` or one group of K frames, the first 1 to K - 1 of which are
    observed; with even odds these are neighbours, else their spacing is drawn like that of any group. To continue what
    is known is what most calls of most schemes do, and where motion is learnt; of `filled` windows few ask for it.

    The others end also when every place is taken, by chance or because N <= K. Observed and latent frames come first,
    in the video's order. With K = 16 and N = 30 a window has on average, observed, latent, padding: `paper` 2.3, 10.7,
    3.0 (61 % of the windows observe nothing), `filled` 3.7, 12.3, 0 (37 %), `continued` 5.9, 10.1, 0 (18 %).

    Args:
        clip_length: N.
        window: K; a clip of fewer frames gives a window of N.
        generator: source of all draws.
        masks: `paper`, `filled` or `continued`.
    """
    places = min(window, clip_length)
    uniform = _uniforms(generator)
    if masks == "continued" and places > 1 and next(uniform) < 0.5:
        spacing = 1.0 if next(uniform) < 0.5 else _draw_spacing(clip_length, places, uniform)
        group = torch.tensor(_evenly_spaced(clip_length, places, spacing, uniform))
        observed = torch.arange(places) < 1 + int(next(uniform) * (places - 1))
        return WindowMasks(group, observed, ~observed)
    role: dict[int, bool] = {}  # frame -> is latent
    while len(role) < places:
        new = [frame for frame in _draw_group(clip_length, places, uniform) if frame not in role]
        free = places - len(role)
        if len(new) > free:
            if masks == "paper":
                break
            begin = int(next(uniform) * (len(new) - free + 1))
            new = new[begin : begin + free]
        latent = not role or next(uniform) < 0.5
        role.update(dict.fromkeys(new, latent))
    frames = sorted(role)
    latent_flags = [role[frame] for frame in frames]
    padding = places - len(frames)
    while len(frames) < places:
        frame = int(next(uniform) * clip_length)
        if frame not in role:
            role[frame] = False
            frames.append(frame)
    return WindowMasks(
        torch.tensor(frames),
        torch.tensor([not flag for flag in latent_flags] + [False] * padding),
        torch.tensor(latent_flags + [False] * padding),
    )


def _draw_group(clip_length: int, window: int, uniform: Iterator[float]) -> list[int]:
    """S frames, s from 1..K: see below. Spacings under 1 would name a frame twice; it is taken once."""
    size = 1 + int(next(uniform) * window)
    return list(dict.fromkeys(_evenly_spaced(clip_length, size, _draw_spacing(clip_length, size, uniform), uniform)))


def _draw_spacing(clip_length: int, size: int, uniform: Iterator[float]) -> float:
    """exp(U ln(N / (s - 0.999)))."""
    return math.exp(next(uniform) * math.log(clip_length / (size - 0.999)))


def _evenly_spaced(clip_length: int, size: int, spacing: float, uniform: Iterator[float]) -> list[int]:
    """The first of s frames is uniform in what room is left."""
    # For a single frame the spacing says nothing; for s frames the last must stay inside the clip.
    room = max(clip_length - spacing * (size - 1), 0.0)
    start = next(uniform) * room
    return [min(int(start + i * spacing), clip_length - 1) for i in range(size)]


def _uniforms(generator: torch.Generator) -> Iterator[float]:
    """Endless numbers from [0, 1)."""
    while True:
        yield from torch.rand(DRAWS_AT_ONCE, generator=generator, dtype=torch.float64).tolist()
