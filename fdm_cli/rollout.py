"""Executes a Plan: gathers observed frames, samples latent ones, gives finished frames in order.

The stages of a wave need nothing of each other, so they and the samples (videos made side by side) share
batches. A **job** is one stage for one sample. Every job has its own random numbers, derived from (seed, sample,
stage): neither the size of a batch, nor the order of the work, nor an interruption changes a video beyond rounding.

A **round** is what is done at once: a batch, or with several processes a batch each. It is committed as a whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import zlib
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdm_cli.batch import Job, Sampling, latent_frames, sample_batch
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.distributed import ALONE, Ranks
from fdm_cli.errors import BadInput, not_numbers
from fdm_cli.files import write_failures
from fdm_cli.frame_store import FrameStore
from fdm_cli.plan import Plan, Stage
from fdm_cli.work_folder import Journal, WorkFolder

Choose = Callable[[int, int, FrameStore], Sequence[int]]
"""(stage, sample, store) -> all the frames that a stage with a `plan.Choice` observes, in any order.

The store has every candidate of that stage, given or made: `store.get(frame, sample)`.
"""

_CHUNK = 64  # finished frames that are handed over at once, or fewer of this many bytes
_CHUNK_BYTES = 2**23


@dataclass(frozen=True)
class Update:
    """What has happened since the last one.

    Attributes:
        windows: jobs finished so far.
        network_calls: so far, batched calls counting once.
        steps: denoising steps done of the round in progress; 0 when none is.
        executed: the jobs that have just been finished, with the frames they really observed.
        replayed: this is still about what an earlier run finished, which may be more than is counted yet.
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
    scratch: Path | None = None,
    ranks: Ranks = ALONE,
) -> Generator[Update, None, None]:
    """Makes `samples` videos; yields after every network call.

    Args:
        checkpoint: the model, on its device.
        plan: of any window; one longer than the model was trained on gives poor frames.
        sampling: how each window is sampled.
        seed: of all random numbers.
        samples: S, videos made side by side.
        given: frame index -> (C, H, W) float32 in [-1, 1], for every frame that the plan takes as given, or
            (S, C, H, W), other frames for each video; may read a frame from somewhere whenever it is asked for it.
        max_batch: windows in one network call.
        choose: chooses the observed frames of stages that leave it to run time.
        work: keeps what is finished, and knows what an earlier run with the same arguments has finished; open. Of
            several processes only rank 0 has one.
        scratch: without `work`, the folder where frames lie meanwhile, in a file that nobody sees; None is the
            system's for such files.
        ranks: the processes that share the work; all of them run this with the same arguments.

    Raises:
        BadInput: `given` does not hold exactly the frames that the plan takes as given; the plan has choices to make
            and there is no `choose`.
        RunFailed: the model's output is not finite; the disk is full.
    """
    given = given or {}
    if given.keys() != set(plan.given_frames):
        raise BadInput("the given frames are not those that the plan was made for")
    config = checkpoint.config.model
    shape = (config.image_channels, config.image_size, config.image_size)
    journal = work.journal if work else None
    earlier = ranks.share(lambda: journal is not None)
    done = calls = 0
    with FrameStore(shape, samples, given, work.frames if work else None, scratch) as store:
        queue = _Queue(plan, samples, store)
        yield from (Update(0, 0, frames=frames, replayed=earlier) for frames in queue.finished())
        for number, batches in enumerate(_rounds(plan, samples, max_batch, ranks.size, sampling.guidance == 1)):
            made = None
            if earlier:
                jobs = [job for batch in batches for job in batch]
                made = ranks.share(partial(_replay, number, jobs, store, journal))
                earlier = made is not None
            if made is None:
                own = batches[ranks.rank] if ranks.rank < len(batches) else []
                own = [_observe(job, plan, choose, store) for job in own]
                newest = None
                for steps, x in enumerate(sample_batch(checkpoint, plan, own, sampling, store, seed), 1):
                    newest = x
                    calls += _calls_a_step(batches, sampling)
                    yield Update(done, calls, steps)
                made = [pair for part in ranks.gather(latent_frames(own, newest)) for pair in part]
                _keep(number, made, store, work)
            else:
                calls += _calls_a_step(batches, sampling) * len(sampling.timesteps)
                if ranks.rank:
                    _keep(number, made, store, None)
            done += len(made)
            queue.add(made)
            _trim()
            yield Update(done, calls, executed=[job for job, _ in made], replayed=earlier)
            yield from (Update(done, calls, frames=frames, replayed=earlier) for frames in queue.finished())


def _trim() -> None:
    """Gives free memory back to the system: batches of unlike sizes leave gaps, 80 MB of them in a long rollout.

    glibc's; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def count_calls(plan: Plan, sampling: Sampling, samples: int, max_batch: int, ranks: Ranks = ALONE) -> int:
    """The network calls that `run` makes, each for a batch of windows."""
    rounds = _rounds(plan, samples, max_batch, ranks.size, sampling.guidance == 1)
    return len(sampling.timesteps) * sum(_calls_a_step(batches, sampling) for batches in rounds)


def _calls_a_step(batches: Sequence[Sequence[Job]], sampling: Sampling) -> int:
    return sum(sampling.calls_a_step(batch[0].stage.observed_count) for batch in batches)


def frames_computed(plan: Plan, sampling: Sampling, samples: int, max_batch: int, ranks: Ranks = ALONE) -> int:
    """Frames in the network calls of the process that has most to do, which is what the time of `run` goes with."""
    rounds = _rounds(plan, samples, max_batch, ranks.size, sampling.guidance == 1)
    return len(sampling.timesteps) * sum(
        max(len(batch) * batch[0].frames for batch in batches) for batches in rounds if batches
    )


def digest(plan: Plan) -> str:
    """A hash of all stages: whether two plans are the same."""
    sha256 = hashlib.sha256()
    for stage in plan.stages:
        sha256.update(repr((stage.observed, stage.choice, stage.latent)).encode())
    return sha256.hexdigest()


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
            if len(chunk) == _CHUNK or len(chunk) * chunk[0].nbytes >= _CHUNK_BYTES:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _is_made(self, frame: int) -> bool:
        stage = self._plan.makers[frame]
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
    known = all(0 <= frame < plan.length and plan.makers[frame] < choice.among for frame in observed)
    if not known or len(set(observed)) != job.stage.observed_count or not set(choice.always) <= set(observed):
        raise ValueError(f"stage {job.number} must observe {job.stage.observed_count} of {choice}, not {observed}")
    return replace(job, observed=observed)


def _keep(number: int, made: _Made, store: FrameStore, work: WorkFolder | None) -> None:
    """Stores a round's frames, then records in the journal that they are there."""
    if not all(frames.isfinite().all() for _, frames in made):
        raise not_numbers()
    with write_failures(work.path if work else "the temporary file of frames"):
        for job, frames in made:
            for index, frame in zip(job.stage.latent, frames, strict=True):
                store.put(index, job.sample, frame)
        if work is not None:
            record: dict[str, Any] = {"round": number, "crc": _checksum(made)}
            if any(job.stage.choice for job, _ in made):
                record["observed"] = [job.observed for job, _ in made]
            work.journal.append(record, store)


def _replay(number: int, jobs: Sequence[Job], store: FrameStore, journal: Journal | None) -> _Made | None:
    """The round as an earlier run finished it; None when it did not, or when its frames are not what it wrote."""
    record = journal.next() if journal else None
    if journal is None or record is None:
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
