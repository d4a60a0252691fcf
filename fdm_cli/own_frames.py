"""Windows that observe what the network has drawn: in a long video all do, in clips none.

Nothing tells a network that has learnt from true frames alone how its own differ: it hands on what is wrong with them,
and each window adds to it. So the weights that a run starts from draw clips again, window after window, each looking
at the one drawn before; and the run learns windows that observe these frames and have the clips' true ones as latent
frames, besides ordinary windows. They are drawn once, before the first step, and lie in the run's folder.

Each window is drawn from noise through which the true frames still show (SDEdit: Meng et al., arXiv 2108.01073): things
are where they were, and only their looks are the network's. What it draws from pure noise goes its own way after a
window or two; to learn the true frames from that is to learn that observed frames tell little.

That one learns from what one has done oneself is the idea of DAgger (Ross, Gordon, Bagnell 2011).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fdm_cli import samplers, video
from fdm_cli.batch import denoiser
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.config import Config
from fdm_cli.dataset import Clips
from fdm_cli.distributed import ALONE, Ranks
from fdm_cli.errors import BadInput, not_numbers
from fdm_cli.files import replacing
from fdm_cli.masks import WindowMasks, sample_masks
from fdm_cli.randomness import generator

WINDOWS = 6  # of a clip that are drawn, one after the other
SAMPLER, STEPS = "dpm-solver++", 15  # from pure noise
FROM = 0.65  # of all timesteps: where it begins instead
CLIPS_A_FILE = 16


@dataclass(frozen=True)
class OwnFrames:
    """Clips as a network has drawn them, and what their true frames are.

    Attributes:
        folder: of the files 00000.npy, 00001.npy, ..., CLIPS_A_FILE clips each, uint8.
        config: of the run: its window, masks and seed, and how many clips.
        clips: of the run.
    """

    folder: Path
    config: Config
    clips: Clips

    def __post_init__(self) -> None:
        """Raises BadInput where the run's data has no clips for them."""
        window, longest = self.config.model.window, self.clips.longest
        if longest is not None and longest < self.length + window:
            raise BadInput(
                f"training.own_share takes clips of {self.length + window} frames; the longest has {longest}",
                "--set training.own_share=0",
            )

    @property
    def given(self) -> int:
        """Frames of a clip that stay true, before those that are drawn."""
        return self.config.model.window // 2

    @property
    def length(self) -> int:
        """Frames of a clip up to the last that is drawn."""
        return self.given + WINDOWS * (self.config.model.window - self.given)

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of a file: clips, frames, H, W, C."""
        model = self.config.model
        return CLIPS_A_FILE, self.length, model.image_size, model.image_size, model.image_channels

    @property
    def files(self) -> list[Path]:
        """Where the frames are, or will be."""
        return [self.folder / f"{n:05}.npy" for n in range(-(-self.config.training.own_clips // CLIPS_A_FILE))]

    def make(self, checkpoint: Checkpoint, at_once: int, ranks: Ranks = ALONE) -> Iterator[int]:
        """Makes the files that are missing; yields how many clips are finished, about.

        Args:
            checkpoint: of the weights that the run starts from.
            at_once: windows in one network call.
            ranks: the processes that share the files.

        Raises:
            RunFailed: frames that are not numbers; a file cannot be written.
        """
        self.folder.mkdir(exist_ok=True)
        for number, path in list(enumerate(self.files))[ranks.rank :: ranks.size]:
            clips = range(number * CLIPS_A_FILE, (number + 1) * CLIPS_A_FILE)
            if not path.exists():
                content = np.empty(self._shape, np.uint8)
                for start in range(0, CLIPS_A_FILE, at_once):
                    part = clips[start : start + at_once]
                    for window, frames in enumerate(self._drawn(checkpoint, part), 1):
                        content[start : start + at_once] = frames
                        yield part.start + len(part) * window // WINDOWS
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.save(file, content)
            yield clips.stop

    @torch.inference_mode()
    def _drawn(self, checkpoint: Checkpoint, numbers: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Clips by their numbers, (clips, frames, H, W, C), after each window that is drawn."""
        process, window = checkpoint.process, self.config.model.window
        device = next(checkpoint.model.parameters()).device
        step = samplers.make(SAMPLER)
        timesteps = samplers.choose_timesteps(process.timesteps, min(STEPS, process.timesteps))
        timesteps = [t for t in timesteps if t < FROM * process.timesteps]
        noisiest = torch.full((len(numbers),), timesteps[0])
        frames = np.stack([self._true(number, np.arange(self.length)) for number in numbers])
        draws = [generator(self.config.training.seed, "own noise", number) for number in numbers]
        for begin in range(self.given, self.length, window - self.given):
            first = begin - self.given
            indices = torch.arange(first, first + window).expand(len(numbers), -1)
            observed = indices < begin
            x_0 = torch.stack([video.to_model(clip[first : first + window]) for clip in frames])
            eps = torch.stack([torch.randn(x_0.shape[1:], generator=own) for own in draws])
            x = process.q_sample(x_0, noisiest, eps).to(device)
            x_0, indices, observed = x_0.to(device), indices.to(device), observed.to(device)
            denoise = denoiser(checkpoint, x_0, indices, observed, ~observed, guidance=1.0)
            *_, x = samplers.sample(denoise, process, x, timesteps, step, partial(torch.zeros_like, x))
            if not x.isfinite().all():
                raise not_numbers()
            for clip, drawn in zip(frames, x, strict=True):
                clip[begin : first + window] = video.to_uint8(drawn[self.given :])
            yield frames

    def check(self) -> None:
        """Raises BadInput where a file is missing, or not what `make` has written."""
        for path in self.files:
            self._load(path)

    @cached_property
    def _made(self) -> list[NDArray[np.uint8]]:
        return [self._load(path) for path in self.files]

    def _load(self, path: Path) -> NDArray[np.uint8]:
        """A file, memory-mapped."""
        try:
            frames: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} cannot be read: {error}") from None
        if frames.shape != self._shape or frames.dtype != np.uint8:
            raise BadInput(f"{path} holds no {self._shape} frames of uint8, as a run of this configuration makes them")
        return frames

    def _true(self, number: int, frame_indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Of clip number `number`."""
        draws = generator(self.config.training.seed, "own", number)
        return self.clips.of_length(self.length + self.config.model.window).clip(draws, frame_indices)

    def draw(self, draws: torch.Generator, places: int) -> tuple[WindowMasks, NDArray[np.uint8]]:
        """A window of K frames, and these, (K, H, W, C): those observed as they were drawn, the others true.

        Three in four are neighbours that continue what was drawn, half of them half a window by the next half, the
        others from any number of frames; the fourth lies among these frames like one of any clip.

        Args:
            draws: source of all draws.
            places: K, at least 2 and at most the network's window.
        """

        def whole(low: int, high: int) -> int:
            """One of low, ..., high."""
            return int(torch.randint(low, high + 1, (), generator=draws))

        number = whole(0, self.config.training.own_clips - 1)
        if whole(1, 4) > 1:
            observed = places // 2 if whole(0, 1) else whole(1, places - 1)
            frames = torch.arange(places) + max(0, whole(self.given + 1, self.length) - observed)
            mask = torch.arange(places) < observed
            window = WindowMasks(frames, mask, ~mask)
        else:
            window = sample_masks(self.length - self.given, places, draws, self.config.data.masks)
            window = replace(window, frame_indices=window.frame_indices + self.given)
        frame_indices, seen = window.frame_indices.numpy(), window.observed.numpy()
        content = self._true(number, frame_indices)
        made = self._made[number // CLIPS_A_FILE][number % CLIPS_A_FILE]
        content[seen] = made[frame_indices[seen]]
        return window, content
