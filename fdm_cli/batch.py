"""One batch of windows: from observed frames and random numbers to latent frames.

A **job** is one stage of a plan for one sample. Every job has its own random numbers, derived from (seed, sample,
stage), so it does not matter which others share its batch. In a window the observed frames come first, then the
latent ones, then padding up to the longest window of the batch. Padding attends only to padding and is left out of the
statistics of the normalisations: a window gives the same alone and beside longer ones, up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fdm_cli import samplers
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput
from fdm_cli.frame_store import FrameStore
from fdm_cli.plan import Plan, Stage
from fdm_cli.randomness import generator
from fdm_cli.window import Window


@dataclass(frozen=True)
class Sampling:
    """How one window is sampled.

    Attributes:
        step: the rule of the reverse process.
        timesteps: descending; one step each.
        guidance: W of history guidance, eps_none + W (eps_observed - eps_none); 1 is none and costs nothing.
        shift: how the timesteps are spaced, see `samplers.choose_timesteps`; 1 is evenly.
        rescale: how far each guided frame's x_0 gets back its mean and deviation, 0 to 1, see `denoiser`.
    """

    step: samplers.Step
    timesteps: Sequence[int]
    guidance: float = 1.0
    shift: float = 1.0
    rescale: float = 0.0

    @staticmethod
    def of(
        sampler: str,
        steps: int | None,
        guidance: float,
        timesteps: int,
        eta: float = 0.0,
        shift: float = 1.0,
        rescale: float = 0.0,
    ) -> Sampling:
        """A sampler by its name, over `steps` of T timesteps, or the sampler's own number of them.

        Raises:
            BadInput: unknown sampler, or an eta that it does not have; more steps than timesteps; a rescaling without
                guidance.
        """
        if rescale and guidance == 1:
            raise BadInput(f"--guidance-rescale {rescale:g} needs guidance, and there is none", "--guidance 2")
        step = samplers.make(sampler, eta)
        steps = steps or min(samplers.DEFAULT_STEPS[sampler], timesteps)
        return Sampling(step, samplers.choose_timesteps(timesteps, steps, shift), guidance, shift, rescale)

    def calls_a_step(self, observed: int) -> int:
        """How often a step calls the network for windows that observe so many frames: guidance takes a second call."""
        return 2 if self.guidance != 1 and observed else 1


@dataclass(frozen=True, slots=True)
class Job:
    """A stage of the plan for one sample.

    Attributes:
        number: of the stage.
        sample: 0 .. S - 1.
        stage: what the plan says of it.
        observed: the frames that it looks at, sorted; of a run-time choice, () until it is made.
    """

    number: int
    sample: int
    stage: Stage
    observed: tuple[int, ...]

    @property
    def frames(self) -> int:
        """Of its window, observed and latent ones."""
        return self.stage.observed_count + len(self.stage.latent)

    @property
    def places(self) -> slice:
        """Where its latent frames stand in the window: after the observed ones."""
        return slice(len(self.observed), len(self.observed) + len(self.stage.latent))


def latent_frames(batch: Sequence[Job], x: Tensor | None) -> list[tuple[Job, Tensor]]:
    """The latent frames of (B, K, C, H, W), on the CPU; nothing of nothing."""
    return [] if x is None else [(job, row[job.places].clone()) for job, row in zip(batch, x.cpu(), strict=True)]


@torch.inference_mode()
def sample_batch(
    checkpoint: Checkpoint, plan: Plan, batch: Sequence[Job], sampling: Sampling, store: FrameStore, seed: int
) -> Iterator[Tensor]:
    """Runs the sampler; yields x (B, K, C, H, W) after every step. Nothing where there are no jobs."""
    if not batch:
        return
    model = checkpoint.model
    config = checkpoint.config.model
    device = next(model.parameters()).device
    shape = (config.image_channels, config.image_size, config.image_size)
    generators = [generator(seed, "stage", job.sample, job.number) for job in batch]
    size = max(job.places.stop for job in batch)

    def noise() -> Tensor:
        """On the latent frames; observed ones enter clean, whatever is put there."""
        drawn = torch.zeros(len(batch), size, *shape)
        for row, job, own in zip(drawn, batch, generators, strict=True):
            row[job.places] = torch.randn(len(job.stage.latent), *shape, generator=own)
        return drawn.to(device)

    x_0 = torch.zeros(len(batch), size, *shape)
    indices = torch.zeros(len(batch), size, dtype=torch.int64)
    observed, latent = (torch.zeros(len(batch), size, dtype=torch.bool) for _ in range(2))
    for row, job in enumerate(batch):
        for column, index in enumerate(job.observed):
            x_0[row, column] = store.get(index, job.sample)
        positions = torch.tensor([*plan.positions(job.stage, job.observed), *job.stage.latent])
        indices[row, : len(positions)] = positions
        indices[row, len(positions) :] = positions[-1]
        observed[row, : job.places.start] = True
        latent[row, job.places] = True
    x_0, indices, observed, latent = (tensor.to(device) for tensor in (x_0, indices, observed, latent))

    denoise = denoiser(checkpoint, x_0, indices, observed, latent, sampling.guidance, sampling.rescale)
    yield from samplers.sample(denoise, checkpoint.process, noise(), sampling.timesteps, sampling.step, noise)


def denoiser(
    checkpoint: Checkpoint,
    x_0: Tensor,
    frame_indices: Tensor,
    observed_mask: Tensor,
    latent_mask: Tensor,
    guidance: float,
    rescale: float = 0.0,
) -> samplers.Denoise:
    """The network with a window's frames bound: (x_t, timestep) -> its output; what never changes is made once.

    Guidance extrapolates from what the network says of the latent frames alone. The observed ones are left out of
    that second call, so it is cheaper than the first. A sum of outputs whose weights add up to 1 means the same
    whether the network predicts eps, v or x_0. All windows have one shape then; else shorter ones end in padding.

    What is extrapolated has more contrast than it should, and in a long video each window adds to it. So each frame's
    guided estimate of x_0 can be given mean and deviation of the one that is not guided, all the way with `rescale` 1,
    not at all with 0. After Lin et al. (arXiv 2305.08891, section 3.4), who do so with the deviation of whole outputs.
    """
    model, process = checkpoint.model, checkpoint.process
    conditions = {"frame_indices": frame_indices, "observed_mask": observed_mask, "latent_mask": latent_mask}
    window = Window.of(frame_indices, observed_mask, latent_mask, ignore_padding=True)
    drafts = model.drafts(x_0, frame_indices, window)

    def denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
        return model(x_t, timestep, x_0=x_0, **conditions, window=window, drafts=drafts)

    observed = int(observed_mask[0].sum())
    if guidance == 1 or observed == 0:  # as in `Sampling.calls_a_step`
        return denoise
    alone = {key: value[:, observed:] for key, value in conditions.items()}
    window_alone = Window.of(*alone.values())

    def guided(x_t: Tensor, timestep: Tensor) -> Tensor:
        output = denoise(x_t, timestep)
        none = model(x_t[:, observed:], timestep, x_0=x_0[:, observed:], **alone, window=window_alone)
        own = output[:, observed:]
        extrapolated = none + guidance * (own - none)
        if rescale:
            extrapolated = _rescaled(process, x_t[:, observed:], timestep, extrapolated, own, rescale)
        output[:, observed:] = extrapolated
        return output

    return guided


def _rescaled(process: Process, x_t: Tensor, timestep: Tensor, output: Tensor, plain: Tensor, rescale: float) -> Tensor:
    """The output with x_0 rescaled towards mean and deviation of the plain one's, each frame for itself."""
    x_0, wanted = (process.predict_x_0(x_t, timestep, value) for value in (output, plain))
    statistics = (torch.std_mean(value, dim=(2, 3, 4), correction=0, keepdim=True) for value in (x_0, wanted))
    (deviation, mean), (wanted_deviation, wanted_mean) = statistics
    alike = wanted_mean + (x_0 - mean) * (wanted_deviation / deviation.clamp(min=1e-6))
    return process.output_for(x_t, timestep, torch.lerp(x_0, alike, rescale))


def most_distances(plan: Plan) -> int:
    """How many different distances between its frames a window has at most.

    Where observed frames are chosen at run time, every distance up to the plan's reach may be among them.
    """
    most = 0
    for stage in plan.stages:
        if stage.observed is None:
            return 2 * plan.reach + 1
        places = (*plan.positions(stage, stage.observed), *stage.latent)
        most = max(most, len(_distances(tuple(place - places[0] for place in places))))
    return most


@lru_cache(4096)
def _distances(places: tuple[int, ...]) -> frozenset[int]:
    """Between all pairs. The windows of a long video repeat each other, shifted."""
    return frozenset(one - other for one in places for other in places)


def seconds_per_frame(checkpoint: Checkpoint, plan: Plan, samples: int, max_batch: int, guidance: float) -> float:
    """How long a network call of this plan takes here for each frame of its windows, measured by making three."""
    config = checkpoint.config.model
    device = next(checkpoint.model.parameters()).device
    widest = plan.widest
    stage = plan.stages[plan.calls // 2]
    shape = (min(widest * samples, max_batch), stage.observed_count + len(stage.latent))
    x = torch.zeros(*shape, config.image_channels, config.image_size, config.image_size, device=device)
    places = torch.arange(shape[1], device=device).expand(shape)
    timestep = torch.zeros(shape[0], dtype=torch.int64, device=device)
    observed = places < stage.observed_count
    denoise = denoiser(checkpoint, x, places, observed, ~observed, guidance)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            denoise(x, timestep).sum().item()
            seconds.append(time.perf_counter() - began)
    return min(seconds) / (shape[0] * shape[1])
