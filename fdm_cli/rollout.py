"""Executes a Plan: gathers observed frames, samples latent ones, gives finished frames in order.

The stages of a wave need nothing of each other, so they and the samples (videos made side by side) share
batches. A **job** is one stage for one sample. Every job has its own random numbers, derived from (seed, sample,
stage): neither the size of a batch, nor the order of the work, nor an interruption changes a video beyond rounding.

A **round** is what is done at once: a batch, or with several processes a batch each. It is committed as a whole.
"""

from __future__ import annotations

import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fdm_cli import samplers
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.distributed import Ranks
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.files import write_failures
from fdm_cli.frame_store import FrameStore
from fdm_cli.plan import Plan, Stage
from fdm_cli.randomness import generator
from fdm_cli.unet import UNet, Window
from fdm_cli.work_folder import Journal, WorkFolder

Choose = Callable[[int, int, FrameStore], Sequence[int]]
"""(stage, sample, store) -> all the frames that a stage with a `plan.Choice` observes, in any order.

The store has every candidate of that stage, given or made: `store.get(frame, sample)`.
"""

_CHUNK_BYTES = 2**24  # of finished frames that are handed over at once


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
    def places(self) -> slice:
        """Where its latent frames stand in the window: after the observed ones."""
        return slice(len(self.observed), len(self.observed) + len(self.stage.latent))


@dataclass(frozen=True)
class Update:
    """What has happened since the last one.

    Attributes:
        windows: jobs finished so far.
        network_calls: so far, batched calls counting once.
        steps: denoising steps done of the round in progress; 0 when none is.
        executed: the jobs that have just been finished, with the frames they really observed.
        replayed: they were finished by an earlier run that this one goes on with.
        frames: newly finished frames in the video's order, each (S, C, H, W) float32 in [-1, 1].
    """

    windows: int
    network_calls: int
    steps: int = 0
    executed: Sequence[Job] = ()
    replayed: bool = False
    frames: Sequence[Tensor] = ()


def run(
    checkpoint: Checkpoint,
    plan: Plan,
    sampling: Sampling,
    *,
    seed: int,
    samples: int = 1,
    given: Mapping[int, Tensor] | None = None,
    max_batch: int = 16,
    choose: Choose | None = None,
    work: WorkFolder | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
) -> Iterator[Update]:
    """Makes `samples` videos; yields after every network call.

    Args:
        checkpoint: the model, on its device.
        plan: made for a window no longer than the model was trained on.
        sampling: how each window is sampled.
        seed: of all random numbers.
        samples: S, videos made side by side.
        given: frame index -> (C, H, W) float32 in [-1, 1], for every frame that the plan takes as given; may read
            a frame from somewhere whenever it is asked for it.
        max_batch: windows in one network call.
        choose: chooses the observed frames of stages that leave it to run time.
        work: keeps what is finished, and knows what an earlier run with the same arguments has finished; open. Of
            several processes only rank 0 has one.
        ranks: the processes that share the work; all of them run this with the same arguments.

    Raises:
        BadInput: `given` does not hold exactly the frames that the plan takes as given; the plan has choices to make
            and there is no `choose`.
        RunFailed: the model's output is not finite; the disk is full.
    """
    given = given or {}
    if given.keys() != {frame for start, stop in plan.given for frame in range(start, stop)}:
        raise BadInput("the given frames are not those that the plan was made for")
    config = checkpoint.config.model
    shape = (config.image_channels, config.image_size, config.image_size)
    journal = work.journal if work else None
    earlier = ranks.share(journal is not None)
    done = calls = 0
    with FrameStore(shape, samples, given, work.frames if work else None) as store:
        queue = _Queue(plan, samples, store)
        yield from (Update(0, 0, frames=frames) for frames in queue.finished())
        for number, batches in enumerate(_rounds(plan, samples, max_batch, ranks.size, sampling.guidance == 1)):
            made = None
            if earlier:
                jobs = [job for batch in batches for job in batch]
                made = ranks.share(_replay(number, jobs, store, journal) if journal else None)
                earlier = made is not None
            if made is None:
                own = batches[ranks.rank] if ranks.rank < len(batches) else []
                own = [_observe(job, plan, choose, store) for job in own]
                x = None
                for steps, x in enumerate(_sample_batch(checkpoint, plan, own, sampling, store, seed), 1):  # noqa: B007
                    calls += len(batches)
                    yield Update(done, calls, steps)
                made = [pair for part in ranks.gather(_latent_frames(own, x)) for pair in part]
                _keep(number, made, store, work)
            else:
                calls += len(batches) * len(sampling.timesteps)
                if ranks.rank:
                    _keep(number, made, store, None)
            done += len(made)
            queue.add(made)
            yield Update(done, calls, executed=[job for job, _ in made], replayed=earlier)
            yield from (Update(done, calls, frames=frames) for frames in queue.finished())


def count_calls(plan: Plan, samples: int, max_batch: int, ranks: Ranks = Ranks(), mixed: bool = True) -> int:  # noqa: B008
    """Batches that `run` makes: network calls per denoising step. With guidance `mixed` is False."""
    return sum(len(batches) for batches in _rounds(plan, samples, max_batch, ranks.size, mixed))


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
    observed = places < stage.observed_count
    denoise = _denoiser(checkpoint.model, x, places, observed, ~observed, guidance)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            denoise(x, timestep).sum().item()
            seconds.append(time.perf_counter() - began)
    return min(seconds)


class _Queue:
    """Says which frames are finished, in the video's order."""

    def __init__(self, plan: Plan, samples: int, store: FrameStore) -> None:
        self._plan = plan
        self._store = store
        self._missing = array("i", [samples]) * plan.calls  # samples that each stage is still to be done for
        self._next = 0

    def add(self, made: _Made) -> None:
        for job, _ in made:
            self._missing[job.number] -= 1

    def finished(self) -> Iterator[list[Tensor]]:
        """The next frames that are finished for all samples, some at a time."""
        chunk: list[Tensor] = []
        while self._next < self._plan.length and self._is_made(self._next):
            chunk.append(self._store.get_all(self._next))
            self._next += 1
            if len(chunk) * chunk[0].nbytes >= _CHUNK_BYTES:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _is_made(self, frame: int) -> bool:
        stage = self._plan.maker(frame)
        return stage < 0 or self._missing[stage] == 0


_Made = list[tuple[Job, Tensor]]  # jobs, and their latent frames (L, C, H, W) in the order of `stage.latent`


def _rounds(plan: Plan, samples: int, max_batch: int, processes: int, mixed: bool) -> Iterator[list[list[Job]]]:
    """The jobs in batches, as many of them at once as there are processes, wave after wave.

    Args:
        plan: its stages.
        samples: S.
        max_batch: jobs in a batch; fewer where that keeps all processes busy.
        processes: P.
        mixed: a batch takes windows however their frames divide into observed and latent ones, and windows up to a
            quarter shorter than its longest, which are padded; else only windows of one shape.
    """

    def size(stage: Stage) -> tuple[int, int]:
        return stage.observed_count + len(stage.latent), 0 if mixed else stage.observed_count

    for wave in plan.by_wave():
        most = min(max_batch, -(-len(wave) * samples // processes))
        batches: list[list[Job]] = []
        for number in sorted(wave, key=lambda number: size(plan.stages[number]), reverse=True):
            stage = plan.stages[number]
            for sample in range(samples):
                longest = size(batches[-1][0].stage) if batches else None
                fits = longest and (4 * size(stage)[0] >= 3 * longest[0] if mixed else size(stage) == longest)
                if not fits or len(batches[-1]) == most:
                    if len(batches) == processes:
                        yield batches
                        batches = []
                    batches.append([])
                batches[-1].append(Job(number, sample, stage, stage.observed or ()))
        yield batches


def _observe(job: Job, plan: Plan, choose: Choose | None, store: FrameStore) -> Job:
    """The job with its observed frames chosen, if that was left to run time."""
    choice = job.stage.choice
    if choice is None:
        return job
    if choose is None:
        raise BadInput(f"{plan.scheme} chooses observed frames by their looks, which needs something to look with")
    observed = tuple(sorted(choose(job.number, job.sample, store)))
    known = all(0 <= frame < plan.length and plan.maker(frame) < choice.among for frame in observed)
    if not known or len(set(observed)) != job.stage.observed_count or not set(choice.always) <= set(observed):
        raise ValueError(f"stage {job.number} must observe {job.stage.observed_count} of {choice}, not {observed}")
    return replace(job, observed=observed)


def _keep(number: int, made: _Made, store: FrameStore, work: WorkFolder | None) -> None:
    """Stores a round's frames, then records in the journal that they are there."""
    if not all(frames.isfinite().all() for _, frames in made):
        raise RunFailed("the model made frames that are not numbers", "is it trained?")
    with write_failures(work.path if work else "the temporary file of frames"):
        for job, frames in made:
            for index, frame in zip(job.stage.latent, frames, strict=True):
                store.put(index, job.sample, frame)
        if work is not None:
            record: dict[str, Any] = {"round": number, "crc": _checksum(made)}
            if any(job.stage.choice for job, _ in made):
                record["observed"] = [job.observed for job, _ in made]
            work.journal.append(record, store)


def _replay(number: int, jobs: Sequence[Job], store: FrameStore, journal: Journal) -> _Made | None:
    """The round as an earlier run finished it; None when it did not, or when its frames are not what it wrote."""
    record = journal.next()
    if record is None:
        return None
    observed = record.get("observed", [job.observed for job in jobs])
    made = [
        (
            replace(job, observed=tuple(frames)),
            torch.stack([store.get(index, job.sample) for index in job.stage.latent]),
        )
        for job, frames in zip(jobs, observed, strict=True)
    ]
    if (record.get("round"), record.get("crc")) == (number, _checksum(made)):
        return made
    journal.reject()
    return None


def _checksum(made: _Made) -> int:
    crc = 0
    for _, frames in made:
        crc = zlib.crc32(frames.contiguous().numpy().data.cast("B"), crc)
    return crc


def _latent_frames(batch: Sequence[Job], x: Tensor | None) -> _Made:
    """The latent frames of (B, K, C, H, W), on the CPU; nothing of nothing."""
    return [] if x is None else [(job, row[job.places].clone()) for job, row in zip(batch, x.cpu(), strict=True)]


@torch.inference_mode()
def _sample_batch(
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

    denoise = _denoiser(model, x_0, indices, observed, latent, sampling.guidance)
    yield from samplers.sample(denoise, checkpoint.process, noise(), sampling.timesteps, sampling.step, noise)


def _denoiser(
    model: UNet, x_0: Tensor, frame_indices: Tensor, observed_mask: Tensor, latent_mask: Tensor, guidance: float
) -> samplers.Denoise:
    """The network with a window's frames bound: (x_t, timestep) -> its output; what never changes is made once.

    Guidance extrapolates from what the network says of the latent frames alone. The observed ones are left out of
    that second call, so it is cheaper than the first. A sum of outputs whose weights add up to 1 means the same
    whether the network predicts eps, v or x_0. All windows have one shape then; else shorter ones end in padding.
    """
    conditions = {"frame_indices": frame_indices, "observed_mask": observed_mask, "latent_mask": latent_mask}
    window = Window.of(frame_indices, observed_mask, latent_mask, ignore_padding=True)

    def denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
        return model(x_t, timestep, x_0=x_0, **conditions, window=window)

    observed = int(observed_mask[0].sum())
    if guidance == 1 or observed == 0:
        return denoise
    alone = {key: value[:, observed:] for key, value in conditions.items()}
    window_alone = Window.of(*alone.values())

    def guided(x_t: Tensor, timestep: Tensor) -> Tensor:
        output = denoise(x_t, timestep)
        none = model(x_t[:, observed:], timestep, x_0=x_0[:, observed:], **alone, window=window_alone)
        output[:, observed:] = none + guidance * (output[:, observed:] - none)
        return output

    return guided
