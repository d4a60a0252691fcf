"""What training steps train on: batches of clips, drawn by number, one ahead of the one that is needed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from fdm_cli import video
from fdm_cli.config import Config
from fdm_cli.dataset import Clips
from fdm_cli.diffusion import shifted
from fdm_cli.masks import sample_masks
from fdm_cli.randomness import generator

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """What one step trains on: videos (B, K, C, H, W), masks and indices (B, K), timestep (B,), noise like x_0."""

    x_0: Tensor
    frame_indices: Tensor
    observed: Tensor
    latent: Tensor
    timestep: Tensor
    eps: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device; from pinned memory the copy runs beside what the device does."""
        beside = device.type == "cuda"
        return Batch(**{name: tensor.to(device, non_blocking=beside) for name, tensor in vars(self).items()})

    def pinned(self) -> Batch:
        """The same in memory from which a GPU fetches by itself."""
        return Batch(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})


def draw_batch(config: Config, clips: Clips, first_number: int, size: int, seed: int) -> Batch:
    """Clips number `first_number`, `first_number` + 1, ... of the endless stream that the seed stands for.

    Each clip is a function of the seed and its number alone: the window, the clip, the timestep and the noise are
    drawn from its generator, in this order.
    """
    data, model = config.data, config.model
    batch_size = config.training.batch_size
    # All windows of a batch have as many frames, whichever step their clips belong to.
    places = min(model.window, data.spanned(first_number // batch_size))
    eps = torch.empty(size, places, model.image_channels, model.image_size, model.image_size)
    videos, windows, timesteps = [], [], []
    for place in range(size):
        draws = generator(seed, "clip", first_number + place)
        spanned = data.spanned((first_number + place) // batch_size)
        window = sample_masks(spanned, places, draws, data.masks)
        videos.append(clips.clip(draws, window.frame_indices.numpy()))
        windows.append(window)
        timesteps.append(draw_timestep(config, draws))
        eps[place].normal_(generator=draws)
    return Batch(
        x_0=video.to_model(np.concatenate(videos)).view_as(eps),
        frame_indices=torch.stack([window.frame_indices for window in windows]),
        observed=torch.stack([window.observed for window in windows]),
        latent=torch.stack([window.latent for window in windows]),
        timestep=torch.tensor(timesteps),
        eps=eps,
    )


def draw_timestep(config: Config, generator: torch.Generator) -> int:
    """One of 0..T-1, at a shift of 1 each as often as any other.

    Others are `shifted`.
    Where x_t is mostly noise the network must learn from the observed frames; elsewhere it soon knows enough.
    """
    timesteps, shift = config.diffusion.timesteps, config.training.timestep_shift
    if shift == 1:
        return int(torch.randint(timesteps, (), generator=generator))
    u = float(torch.rand((), generator=generator, dtype=torch.float64))
    return min(timesteps - 1, int(timesteps * shifted(u, shift)))


class Ahead(Generic[T]):
    """Makes things by number, each while the one before is being used.

    Asking for number n returns it and starts making n + 1 in a thread. What is returned does not depend on the
    thread: any number may be asked for at any time, only those asked for in order were made beforehand. What
    `make` raises is raised where the thing is asked for.

    Args:
        make: a function of the number alone.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        # Ends with the interpreter, at the latest when the thing in the making is done.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[T]] | None = None

    def __call__(self, number: int) -> T:
        """Thing number `number`."""
        number_made, future = self._next or (None, None)
        made = future.result() if future is not None and number_made == number else self._make(number)
        self._next = number + 1, self._thread.submit(self._make, number + 1)
        return made
