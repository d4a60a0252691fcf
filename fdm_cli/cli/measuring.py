"""The measurements of `fdm evaluate`, each with its progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fdm_cli import given as givens
from fdm_cli.cli import evaluation_report as report
from fdm_cli.cli import memory_report
from fdm_cli.cli.plan_report import warn_of_begin, warn_of_blind, warn_of_reach
from fdm_cli.cli.render import Output, Progress, plural
from fdm_cli.errors import BadInput

if TYPE_CHECKING:
    import torch

    from fdm_cli.batch import Sampling
    from fdm_cli.budget import Budget
    from fdm_cli.checkpoint import Checkpoint
    from fdm_cli.dataset import Clips
    from fdm_cli.diversity import Embedding
    from fdm_cli.evaluate import Bound, Prediction
    from fdm_cli.frechet import VideoFeatures
    from fdm_cli.plan import Plan
    from fdm_cli.scheme import Scheme

T = TypeVar("T")

LEAST_REAL, LEAST_SEEN = 256, 64  # real clips for comparison, and where the features of each are computed
FEW_VIDEOS = 256  # a Frechet distance of fewer says little


@dataclass(frozen=True)
class Setting:
    """What all parts of an evaluation share."""

    checkpoint: Checkpoint
    clips: Clips
    sampling: Sampling
    seed: int
    given: int
    max_batch: int | None
    budget: Budget | None
    device: torch.device
    output: Output

    def batch(self, plan: Any, widest: int) -> int:
        """How many windows of a plan go into one network call."""
        return memory_report.sampling_batch(
            self.checkpoint, self.max_batch, widest, plan, self.budget, self.device, self.output
        )

    def run(self, work: Generator[int, None, T], calls: int, what: str) -> T:
        """The result of a measurement, with progress while it is made."""
        self.output.note(f"{what}: {plural(calls, 'network call')}")
        with self.output.progress(calls, "network calls") as progress:
            return _drive(work, progress, what)


def _drive(work: Generator[int, None, T], progress: Progress, what: str) -> T:
    """Runs a generator to its end; returns what it returns."""
    while True:
        try:
            progress.update(next(work), what)
        except StopIteration as stop:
            return stop.value


def _windows(setting: Setting, count: int) -> torch.Tensor:
    """(clips, K, C, H, W), the same for prediction and bound."""
    import torch

    from fdm_cli.evaluate import held_out_clips

    model = setting.checkpoint.config.model
    windows = torch.empty(count, model.window, model.image_channels, model.image_size, model.image_size)
    for row, clip in zip(windows, held_out_clips(setting.clips, "window", count, model.window), strict=True):
        row.copy_(clip)  # never all of them twice
    return windows


def predict(setting: Setting, count: int, futures: int, batch: int) -> Prediction:
    """The prediction of `count` windows, so many futures each, `batch` windows in a network call."""
    from fdm_cli import evaluate as evaluation
    from fdm_cli import rollout

    plan = evaluation.prediction_plan(setting.checkpoint.config.model.window, setting.given)
    calls = rollout.count_calls(plan, setting.sampling, count, batch) * futures
    work = evaluation.predict(
        setting.checkpoint, _windows(setting, count), setting.given, setting.sampling,
        seed=setting.seed, futures=futures, max_batch=batch,
    )  # fmt: skip
    return setting.run(work, calls, "prediction")


def choose_bound_timesteps(checkpoint: Checkpoint, steps: int | None) -> list[int]:
    """So many timesteps, or 25 where nobody says; BadInput for more than the process has."""
    from fdm_cli import samplers

    total = checkpoint.process.timesteps
    steps = steps or min(25, total)
    if steps > total:
        raise BadInput(f"--bound-timesteps {steps}: the model's process has {total}", f"take 2 to {total}")
    return samplers.choose_timesteps(total, steps)


def bound(setting: Setting, count: int, timesteps: Sequence[int], batch: int) -> Bound:
    """The bound on `count` windows at these timesteps, `batch` windows in a network call."""
    from fdm_cli import evaluate as evaluation

    work = evaluation.measure_bound(
        setting.checkpoint, _windows(setting, count), setting.given, timesteps, seed=setting.seed, max_batch=batch
    )
    return setting.run(work, -(-count // batch) * len(timesteps), "bound")


@dataclass(frozen=True)
class Rollouts:
    """What is to be rolled out, and what it will be compared with: found before anything is measured."""

    plans: Sequence[tuple[Scheme, Plan, int]]  # and how many windows go into one network call
    embedding: Embedding | None
    network: VideoFeatures | None
    drifts: report.Drifts  # of no scheme yet


def prepare_drift(
    setting: Setting, loaded: Sequence[Scheme], length: int, step: int | None, begin: int | None, rollouts: int,
    embedding: str, network: VideoFeatures | None,
) -> Rollouts:  # fmt: skip
    """Makes the plans and looks at the real clips; BadInput for whatever could not be rolled out."""
    from fdm_cli import diversity
    from fdm_cli import evaluate as evaluation
    from fdm_cli import plan as planning

    window, clips, output = setting.checkpoint.config.model.window, setting.clips, setting.output
    plans = []
    for scheme in loaded:
        spans = givens.example(scheme, length=length, window=window, step=step)
        plan = planning.make(scheme, length=length, window=window, step=step, begin=begin, given=spans)
        if plan.calls == 0:
            raise BadInput(f"{scheme.name} has nothing to make of {plural(length, 'frame')}", "a larger --length")
        if plan.given:
            evaluation.check_length(clips, length)
        warn_of_reach(plan, setting.checkpoint.clip_length, output, scheme.name)
        warn_of_blind(plan, output, f"{scheme.name}: ")
        warn_of_begin(plan, begin, output, f"{scheme.name}: ")
        widest = plan.widest * rollouts
        plans.append((scheme, plan, setting.batch(plan, widest)))
    real_length = length if clips.longest is None or clips.longest >= length else clips.shortest or length
    if real_length < length:
        output.warn(f"no held-out clip has {length} frames: rollouts are compared with clips of {real_length}")
    no_fvd = report.why_no_fvd(network is not None, rollouts, length, real_length)
    if no_fvd:
        if network is not None:
            output.warn(f"no Frechet video distance: {no_fvd}")
        network = None
    elif rollouts < FEW_VIDEOS:
        output.warn(f"a Frechet distance of {rollouts} videos is much larger than that of many: compare equal numbers")
    adaptive = any(scheme.adaptive for scheme in loaded)
    embedder = diversity.make_embedding(embedding, setting.device) if adaptive else None
    real_clips = max(rollouts, LEAST_SEEN if network else LEAST_REAL)
    with output.progress(real_clips, "real clips") as progress:
        videos = evaluation.held_out_clips(clips, "video", real_clips, real_length)
        real, features = _drive(evaluation.real_statistics(videos, network), progress, "")
    drifts = report.Drifts(
        length=length,
        rollouts=rollouts,
        real_clips=real_clips,
        real_length=real_length,
        real_videos=clips.of_length(real_length).videos,
        real=real,
        real_features=features,
        no_fvd=no_fvd,
        schemes={},
    )
    return Rollouts(plans, embedder, network, drifts)


def drift(setting: Setting, asked: Rollouts) -> report.Drifts:
    """Makes the videos of each scheme and measures them."""
    import torch

    from fdm_cli import diversity, rollout
    from fdm_cli import evaluate as evaluation

    length, rollouts = asked.drifts.length, asked.drifts.rollouts
    found = {}
    for scheme, plan, batch in asked.plans:
        places = plan.given_frames
        frames: dict[int, torch.Tensor] = {}
        if places:
            videos = [
                video[places] for video in evaluation.held_out_clips(setting.clips, "video", rollouts, length)
            ]  # the whole clip is needed: given frames stand far apart
            frames = dict(zip(places, torch.stack(videos, dim=1), strict=True))
        calls = rollout.count_calls(plan, setting.sampling, rollouts, batch)
        choose = None
        if scheme.adaptive and asked.embedding is not None:
            choose = diversity.Diversity(plan, asked.embedding, rollouts).choose
        work = evaluation.roll_out(
            setting.checkpoint, plan, setting.sampling, frames,
            seed=setting.seed, samples=rollouts, max_batch=batch, choose=choose, network=asked.network,
        )  # fmt: skip
        found[plan.scheme] = plan, setting.run(work, calls, f"drift of {plan.scheme}")
    return dataclasses.replace(asked.drifts, schemes=found)
