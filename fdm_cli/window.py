"""The frames of a network call: which are observed and latent, and which of them look at which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fdm_cli.attention import Distances


@dataclass(frozen=True)
class Alike:
    """Clips with equally many observed and equally many latent frames; places among the B * K frames of a call.

    Attributes:
        clips: (b,) int64.
        observed: (b, O) int64.
        latent: (b, L) int64.
    """

    clips: Tensor
    observed: Tensor
    latent: Tensor

    @staticmethod
    def among(observed: Tensor, latent: Tensor) -> list[Alike]:
        """All clips of (B, K) bool masks that have both kinds of frames."""
        counts = torch.stack([observed.sum(1), latent.sum(1)], dim=1)
        kinds, kind_of_clip = torch.unique(counts, dim=0, return_inverse=True)
        places = torch.arange(observed.numel(), device=observed.device).view_as(observed)
        groups = []
        for number, (of_observed, of_latent) in enumerate(kinds.tolist()):
            if of_observed and of_latent:
                clips = (kind_of_clip == number).nonzero().squeeze(1)
                own = places[clips]
                found = (own[mask[clips]].view(len(clips), -1) for mask in (observed, latent))
                groups.append(Alike(clips, *found))
        return groups


@dataclass(frozen=True)
class Window:
    """What a call needs to know of its frames, the same at every denoising step: made once per window.

    Attributes:
        observed: (B, K) bool.
        latent: (B, K) bool.
        allowed: (B, K, K) bool, which frame attends to which: real ones to real ones, padding to padding; None when
            there is no padding.
        distances: between the frames.
        clip_of_frame: (B * K,) int64, the clip that each frame belongs to.
        latent_frames: the latent ones among the B * K frames, int64, and others that make up their number.
        counted: (B, K) bool, the frames that enter the statistics of the temporal GroupNorms; None for all.
    """

    observed: Tensor
    latent: Tensor
    allowed: Tensor | None
    distances: Distances
    clip_of_frame: Tensor
    latent_frames: Tensor
    counted: Tensor | None = None

    @cached_property
    def alike(self) -> list[Alike]:
        """Its clips by their numbers of observed and of latent frames."""
        return Alike.among(self.observed, self.latent)

    @staticmethod
    def of(
        frame_indices: Tensor,
        observed_mask: Tensor,
        latent_mask: Tensor,
        *,
        ignore_padding: bool = False,
        multiple: int = 1,
    ) -> Window:
        """From (B, K) int64 positions in the video and (B, K) bool masks.

        As many frames are computed to the end as there are latent ones, made up to a `multiple` by others of the call.

        Padding takes part in the statistics of the temporal GroupNorms: so it was when predecessors' models were
        trained, and ours are. With `ignore_padding` it does not, and a padded window gives what it gives without.
        """
        clips, count = frame_indices.shape
        real = observed_mask | latent_mask
        return Window(
            observed=observed_mask,
            latent=latent_mask,
            allowed=None if bool(real.all()) else real[:, :, None] == real[:, None, :],
            distances=Distances.between(frame_indices),
            clip_of_frame=torch.arange(clips, device=frame_indices.device).repeat_interleave(count),
            latent_frames=_made_up(latent_mask.flatten(), multiple),
            counted=real if ignore_padding and not real.all() else None,
        )


def _made_up(latent: Tensor, multiple: int) -> Tensor:
    """Where (F,) bool is set, int64, ascending; with as many other places as make the number a multiple, or F."""
    if multiple == 1:
        return latent.nonzero().squeeze(1)
    number = -(-int(latent.sum()) // multiple) * multiple
    return latent.argsort(descending=True, stable=True)[:number].sort().values
