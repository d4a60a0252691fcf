"""Executes a Plan: gathers observed frames, samples latent ones, gives finished frames in order.

The stages of a wave need nothing of each other, so they and the samples (videos made side by side) share
batches. Every sample of every stage has its own random numbers, derived from (seed, sample, stage): neither
the size of a batch nor the order of the work changes a video beyond rounding.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdm_cli import samplers
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.errors import BadInput
from fdm_cli.plan import Plan, Stage
from fdm_cli.randomness import generator
from fdm_cli.unet import UNet, Window


@dataclass(frozen=True)
class Sampling:
    """How one window is sampled.

    Attributes:
        step: the rule of the reverse process.
        timesteps: descending; one network call each.
        guidance: W of history guidance, eps_none + W (eps_observed - eps_none); 1 is none and costs nothing.
    """

    step: samplers.Step
    timesteps: Sequence[int]
    guidance: float = 1.0


@dataclass(frozen=True)
class Update:
    """What has happened since the last one.

    Attributes:
        windows: (stage, sample) pairs finished so far.
        network_calls: so far, batched calls counting once.
        frames: newly finished frames in the video's order, each (S, C, H, W) float32 in [-1, 1].
    """

    windows: int
    network_calls: int
    frames: list[Tensor] = field(default_factory=list)


class FrameStore:
    """Frames by their index, kept as long as somebody needs them: the writer, or a later stage.

    Args:
        plan: says which stage is the last to observe a frame.
        given: frame index -> (C, H, W).
        samples: S; all samples share the given frames.
    """

    def __init__(self, plan: Plan, given: Mapping[int, Tensor], samples: int) -> None:
        self._frames = {index: frame.expand(samples, -1, -1, -1) for index, frame in given.items()}
        self._plan = plan
        self._samples = samples
        self._next_out = 0
        self._written: dict[int, list[int]] = {}  # stage -> written frames that it is the last to observe

    def get(self, index: int, sample: int) -> Tensor:
        """One frame of one sample, (C, H, W)."""
        return self._frames[index][sample]

    def put(self, index: int, sample: int, frame: Tensor) -> None:
        """Stores a latent frame that has become clean, (C, H, W)."""
        if index not in self._frames:
            self._frames[index] = frame.new_empty(self._samples, *frame.shape)
        self._frames[index][sample] = frame

    def take_finished(self, stages: Sequence[int]) -> list[Tensor]:
        """Called after each wave, with its stages: the next frames in the video's order that are there."""
        for stage in stages:
            for index in self._written.pop(stage, ()):
                del self._frames[index]
        wave = self._plan.stages.waves[stages[0]]
        finished = []
        while self._next_out in self._frames:
            finished.append(self._frames[self._next_out])
            last = self._plan.last_observer(self._next_out)
            if last < 0 or self._plan.stages.waves[last] <= wave:
                del self._frames[self._next_out]
            else:
                self._written.setdefault(last, []).append(self._next_out)
            self._next_out += 1
        return finished


def run(
    checkpoint: Checkpoint,
    plan: Plan,
    sampling: Sampling,
    *,
    seed: int,
    samples: int = 1,
    given: Mapping[int, Tensor] | None = None,
    max_batch: int = 16,
) -> Iterator[Update]:
    """Makes `samples` videos; yields after every network call.

    Args:
        checkpoint: the model, on its device.
        plan: made for a window no longer than the model was trained on.
        sampling: how each window is sampled.
        seed: of all random numbers.
        samples: S, videos made side by side.
        given: frame index -> (C, H, W) float32 in [-1, 1], for every frame that the plan takes as given.
        max_batch: windows in one network call.

    Raises:
        BadInput: `given` does not hold exactly the frames that the plan takes as given.
    """
    given = dict(given or {})
    if given.keys() != {frame for start, stop in plan.given for frame in range(start, stop)}:
        raise BadInput("the given frames are not those that the plan was made for")
    store = FrameStore(plan, given, samples)
    done = calls = 0
    for wave in plan.by_wave():
        for batch in _batches(_windows(plan, wave, samples), max_batch):
            for finished, x in _sample_batch(checkpoint, plan, batch, sampling, store, seed):
                calls += 1
                if finished:
                    done += len(batch)
                    _scatter(batch, x, store)
                yield Update(done, calls)
        yield Update(done, calls, store.take_finished(wave))


def count_calls(plan: Plan, samples: int, max_batch: int) -> int:
    """Batches that `run` makes: network calls per denoising step."""
    return sum(1 for wave in plan.by_wave() for _ in _batches(_windows(plan, wave, samples), max_batch))


def seconds_per_call(checkpoint: Checkpoint, plan: Plan, samples: int, max_batch: int, guidance: float) -> float:
    """How long a typical network call of this plan takes here, measured by making three."""
    config = checkpoint.config.model
    device = next(checkpoint.model.parameters()).device
    widest = max(len(wave) for wave in plan.by_wave())
    stage = plan.stages[plan.calls // 2]
    shape = (min(widest * samples, max_batch), stage.observed_count + len(stage.latent))
    x = torch.zeros(*shape, config.image_channels, config.image_size, config.image_size, device=device)
    places = torch.arange(shape[1], device=device).expand(shape)
    timestep = torch.zeros(shape[0], dtype=torch.int64, device=device)
    denoise = _denoiser(checkpoint.model, x, places, places < stage.observed_count, guidance)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            denoise(x, timestep).sum().item()
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def _windows(plan: Plan, wave: Sequence[int], samples: int) -> list[_Window]:
    return [_Window(number, plan.stages[number], sample) for number in wave for sample in range(samples)]


@dataclass(frozen=True)
class _Window:
    """A stage of the plan for one sample."""

    number: int
    stage: Stage
    sample: int

    @property
    def observed(self) -> tuple[int, ...]:
        """The frames it looks at."""
        return self.stage.observed or ()

    @property
    def shape(self) -> tuple[int, int]:
        """How many frames are observed, how many latent."""
        return len(self.observed), len(self.stage.latent)


def _batches(windows: list[_Window], max_batch: int) -> Iterator[list[_Window]]:
    """The windows in batches of equal shape: none is ever padded to fit its neighbours."""
    for _, same in itertools.groupby(sorted(windows, key=lambda w: w.shape), key=lambda w: w.shape):
        rest = list(same)
        while rest:
            yield rest[:max_batch]
            rest = rest[max_batch:]


def _sample_batch(
    checkpoint: Checkpoint,
    plan: Plan,
    batch: list[_Window],
    sampling: Sampling,
    store: FrameStore,
    seed: int,
) -> Iterator[tuple[bool, Tensor]]:
    """Runs the sampler; yields (finished, x) after every step, x (B, K, C, H, W)."""
    model = checkpoint.model
    config = checkpoint.config.model
    device = next(model.parameters()).device
    observed, latent = batch[0].shape
    shape = (config.image_channels, config.image_size, config.image_size)
    generators = [generator(seed, "stage", window.sample, window.number) for window in batch]

    def noise() -> Tensor:
        """On the latent frames; observed ones enter clean, whatever is put there."""
        drawn = torch.stack([torch.randn(latent, *shape, generator=own) for own in generators])
        return torch.cat([drawn.new_zeros(len(batch), observed, *shape), drawn], dim=1).to(device)

    x_0 = torch.zeros(len(batch), observed + latent, *shape)
    for row, window in enumerate(batch):
        for place, index in enumerate(window.observed):
            x_0[row, place] = store.get(index, window.sample)
    x_0 = x_0.to(device)
    indices = torch.tensor([(*plan.positions(w.stage, w.observed), *w.stage.latent) for w in batch], device=device)
    observed_mask = torch.arange(observed + latent, device=device).expand(len(batch), -1) < observed

    denoise = _denoiser(model, x_0, indices, observed_mask, sampling.guidance)
    remaining = len(sampling.timesteps)
    with torch.inference_mode():
        for x in samplers.sample(denoise, checkpoint.process, noise(), sampling.timesteps, sampling.step, noise):
            remaining -= 1
            yield remaining == 0, x


def _denoiser(
    model: UNet, x_0: Tensor, frame_indices: Tensor, observed_mask: Tensor, guidance: float
) -> samplers.Denoise:
    """The network with a window's frames bound: (x_t, timestep) -> its output; what never changes is made once.

    Guidance extrapolates from what the network says of the latent frames alone. The observed ones are left out of
    that second call, so it is cheaper than the first. A sum of outputs whose weights add up to 1 means the same
    whether the network predicts eps, v or x_0.
    """
    conditions = {"frame_indices": frame_indices, "observed_mask": observed_mask, "latent_mask": ~observed_mask}
    window = Window.of(**conditions)

    def denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
        return model(x_t, timestep, x_0=x_0, **conditions, window=window)

    observed = int(observed_mask[0].sum())
    if guidance == 1 or observed == 0:
        return denoise
    alone = {key: value[:, observed:] for key, value in conditions.items()}
    window_alone = Window.of(**alone)

    def guided(x_t: Tensor, timestep: Tensor) -> Tensor:
        output = denoise(x_t, timestep)
        none = model(x_t[:, observed:], timestep, x_0=x_0[:, observed:], **alone, window=window_alone)
        output[:, observed:] = none + guidance * (output[:, observed:] - none)
        return output

    return guided


def _scatter(batch: list[_Window], x: Tensor, store: FrameStore) -> None:
    """Stores the latent frames of (B, K, C, H, W)."""
    x = x.cpu()
    for row, window in enumerate(batch):
        for place, index in enumerate(window.stage.latent, start=len(window.observed)):
            store.put(index, window.sample, x[row, place].clone())
