"""Which frames of a training clip the network sees, which of them are observed and which latent.

The training distribution of FDM (arXiv 2205.11495, algorithm 3 of the appendix): groups of evenly spaced
frames; the first group is latent, each further one observed or latent with even odds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowMasks:
    """K frames of a clip and their roles; frames that are neither observed nor latent are padding.

    Attributes:
        frame_indices: (K,) int64, positions in the clip, each at most once (padding may repeat when the clip
            is shorter than needed).
        observed: (K,) bool.
        latent: (K,) bool; disjoint from `observed`, at least one is set.
    """

    frame_indices: Tensor
    observed: Tensor
    latent: Tensor


def sample_masks(clip_length: int, window: int, generator: torch.Generator) -> WindowMasks:
    """Draws one training window from a clip of N frames.

    Groups are drawn until one does not fit any more or every place (or every frame, when N <= K) is taken.
    The known and unknown frames come first, in the video's order; padding fills the rest with other frames
    of the clip, which take part in nothing but the statistics of the normalisations.

    Args:
        clip_length: N.
        window: K; a clip of fewer frames gives a window of N.
        generator: source of all draws.
    """
    places = min(window, clip_length)
    role: dict[int, bool] = {}  # frame -> is latent
    while len(role) < places:
        group = [frame for frame in _draw_group(clip_length, places, generator) if frame not in role]
        if len(role) + len(group) > places:
            break
        latent = not role or _uniform(generator) < 0.5
        role.update(dict.fromkeys(group, latent))
    frames = sorted(role)
    latent_flags = [role[frame] for frame in frames]
    padding = places - len(frames)
    if padding:
        rest = [frame for frame in range(clip_length) if frame not in role]
        order = torch.randperm(len(rest), generator=generator)[:padding].tolist()
        frames += [rest[i] for i in order]
    return WindowMasks(
        torch.tensor(frames),
        torch.tensor([not flag for flag in latent_flags] + [False] * padding),
        torch.tensor(latent_flags + [False] * padding),
    )


def _draw_group(clip_length: int, window: int, generator: torch.Generator) -> list[int]:
    """S frames from 1..K, spacing exp(U ln(N / (s - 0.999))), start uniform in what room is left."""
    size = int(torch.randint(1, window + 1, (), generator=generator))
    spacing = math.exp(_uniform(generator) * math.log(clip_length / (size - 0.999)))
    # For a single frame the spacing says nothing; for s frames the last must stay inside the clip.
    room = max(clip_length - spacing * (size - 1), 0.0)
    start = _uniform(generator) * room
    return [min(int(start + i * spacing), clip_length - 1) for i in range(size)]


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))
