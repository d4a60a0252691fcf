"""Which frames of a training clip the network sees, which of them are observed and which latent.

The training distribution of FDM (arXiv 2205.11495, algorithm 3 of the appendix): groups of evenly spaced
frames; the first group is latent, each further one observed or latent with even odds. `filled` is the same
without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Masks = Literal["paper", "filled"]

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
    first group that has more new frames than there are free places is where the two distributions differ:

    - `paper`: it is thrown away and the window is done. Padding fills the free places: other frames of the clip,
      drawn uniformly, which take part in nothing but the statistics of the normalisations.
    - `filled`: it gives as many of its new frames as there are free places, neighbours within the group, the first of
      them drawn uniformly, in the role that it has drawn like every other group. So every place is observed or latent.

    Both end also when every place is taken, by chance or because N <= K. Observed and latent frames come first, in the
    video's order. With K = 16 and N = 30 a window has on average, observed, latent, padding: `paper` 2.3, 10.7, 3.0
    (61 % of the windows observe nothing), `filled` 3.7, 12.3, 0 (37 %).

    Args:
        clip_length: N.
        window: K; a clip of fewer frames gives a window of N.
        generator: source of all draws.
        masks: `paper` or `filled`.
    """
    places = min(window, clip_length)
    uniform = _uniforms(generator)
    role: dict[int, bool] = {}  # frame -> is latent
    while len(role) < places:
        group = [frame for frame in _draw_group(clip_length, places, uniform) if frame not in role]
        free = places - len(role)
        if len(group) > free:
            if masks == "paper":
                break
            begin = int(next(uniform) * (len(group) - free + 1))
            group = group[begin : begin + free]
        latent = not role or next(uniform) < 0.5
        role.update(dict.fromkeys(group, latent))
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
    """S different frames, s from 1..K, spacing exp(U ln(N / (s - 0.999))), start uniform in what room is left."""
    size = 1 + int(next(uniform) * window)
    spacing = math.exp(next(uniform) * math.log(clip_length / (size - 0.999)))
    # For a single frame the spacing says nothing; for s frames the last must stay inside the clip.
    room = max(clip_length - spacing * (size - 1), 0.0)
    start = next(uniform) * room
    return list(dict.fromkeys(min(int(start + i * spacing), clip_length - 1) for i in range(size)))


def _uniforms(generator: torch.Generator) -> Iterator[float]:
    """Endless numbers from [0, 1)."""
    while True:
        yield from torch.rand(DRAWS_AT_ONCE, generator=generator, dtype=torch.float64).tolist()
