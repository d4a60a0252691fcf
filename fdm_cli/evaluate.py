"""How good a model is, on clips that training never saw: prediction, the variational bound, drift of long rollouts.

Clips are numbered, and each is a function of its number alone: every model, scheme and batch size is measured on the
same ones. The noise of a sample belongs to (seed, sample), as in `rollout`. All of it is made by the code that makes
videos. Each measurement is a generator: it yields the network calls made (or clips looked at) so far, and returns what
it found.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fdm_cli import metrics, rollout, scheme
from fdm_cli import plan as planning
from fdm_cli.batch import Sampling, denoiser
from fdm_cli.bound import Respaced
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.dataset import Clips
from fdm_cli.errors import BadInput, not_numbers
from fdm_cli.frechet import VideoFeatures
from fdm_cli.metrics import unit
from fdm_cli.plan import Plan
from fdm_cli.randomness import derive_seed, generator
from fdm_cli.video import to_model
from fdm_cli.window import Window

ENDS = 10  # frames at the beginning and at the end of a rollout that are compared
AT_ONCE = 512  # frames of a real clip that are measured together: a long one needs no room for copies of all
REMEMBERED = 16  # frames: as far before each lies the one that `kept` looks at
STATISTICS = ("ink", "grey", "sharpness", "changed", "kept")


@dataclass(frozen=True)
class Quality:
    """How close frames are to the true ones, H frames ahead and over all.

    Attributes:
        psnr: (H,) dB, of the squared error averaged over all clips at each horizon.
        psnr_all: dB, of the squared error averaged over all clips and horizons.
        ssim: (H,), averaged over all clips; None where frames are too small for it.
        ssim_all: over all horizons.
        sharpness: (H,) gradient energy, as a ratio to the true frames' at the same horizon.
        sharpness_all: the ratio over all horizons.
    """

    psnr: list[float]
    psnr_all: float
    ssim: list[float] | None
    ssim_all: float | None
    sharpness: list[float]
    sharpness_all: float


@dataclass(frozen=True)
class Prediction:
    """The rest of a window from its first frames.

    Attributes:
        model: averaged over all futures.
        best: of each clip's futures the one with the least squared error (for SSIM: the greatest SSIM) over all
            predicted frames; the same as `model` of one future.
        copy_last: the last given frame, repeated.
        mean_given: the mean of the given frames, repeated.
        draft: what the model makes of the given frames before it samples, see `draft.Draft`; None where it makes none.
    """

    model: Quality
    best: Quality
    copy_last: Quality
    mean_given: Quality
    draft: Quality | None


@dataclass(frozen=True)
class Bound:
    """The variational bound in bits per dimension of latent frames, averaged over clips; see `bound`.

    Attributes:
        total: the sum of the parts.
        prior: of x_T.
        divergence: of all steps but the last.
        decoder: of the step to the clean frames.
        timesteps: the chosen ones, ascending.
        terms: (n,) for each of them, the decoder's first.
    """

    total: float
    prior: float
    divergence: float
    decoder: float
    timesteps: tuple[int, ...]
    terms: list[float]


@dataclass(frozen=True)
class Statistics:
    """What the frames of videos look like, frame by frame, averaged over the videos; see `metrics`.

    Attributes:
        ink: mean pixel.
        grey: of the pixels above 0.1 the share between 0.25 and 0.75.
        sharpness: gradient energy.
        changed: share of pixels that differ by more than 0.1 from the frame before; NaN of the first frame.
        kept: share of a frame that is made of pieces of the one 16 before; NaN of the first 16.
    """

    ink: list[float]
    grey: list[float]
    sharpness: list[float]
    changed: list[float]
    kept: list[float]

    def mean(self, name: str, frames: Sequence[int] | None = None) -> float:
        """Of one statistic over some frames, or all; frames without a value are left out."""
        values = getattr(self, name)
        known = [values[frame] for frame in (range(len(values)) if frames is None else frames)]
        known = [value for value in known if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class Drift:
    """Long rollouts of one scheme.

    Attributes:
        statistics: of all frames.
        first, last: the first and the last ten frames that were generated.
        network_calls: batched ones, as they were made.
        seconds: of making them.
        features: (videos, F) for the Frechet video distance, of whole videos, given frames and all; None when that is
            not measured.
    """

    statistics: Statistics
    first: list[int]
    last: list[int]
    network_calls: int
    seconds: float
    features: Tensor | None


def held_out_clips(clips: Clips, what: str, count: int, length: int) -> Iterator[Tensor]:
    """Clips number 0, 1, ..., each (N, C, H, W) float32 in [-1, 1].

    Args:
        clips: the held-out ones.
        what: they are for; another word is another stream of clips.
        count: how many.
        length: N.

    Raises:
        BadInput: no video is so long.
    """
    check_length(clips, length)
    source = clips.of_length(length)
    for number in range(count):
        yield to_model(source.clip(generator("evaluate", what, number), np.arange(length)))


def check_length(clips: Clips, length: int, hint: str | None = None) -> None:
    """Raises BadInput when no video has so many frames."""
    if clips.longest is not None and clips.longest < length:
        raise BadInput(f"no held-out clip has {length} frames; the longest has {clips.longest}", hint)


def prediction_plan(window: int, given: int) -> Plan:
    """One window: its first `given` frames are observed, the others latent. BadInput unless 1 <= given < window."""
    if window < 2:
        raise BadInput("a model whose window is one frame predicts nothing from given ones", "--only drift")
    if not 1 <= given < window:
        raise BadInput(f"{given} given frames of a window of {window}", f"--given takes 1 to {window - 1}")
    return planning.make(scheme.load("single"), length=window, window=window, given=((0, given),))


def predict(
    checkpoint: Checkpoint, true: Tensor, given: int, sampling: Sampling, *, seed: int, futures: int, max_batch: int
) -> Generator[int, None, Prediction]:
    """Predicts the rest of windows from their first frames.

    Args:
        checkpoint: the model.
        true: (clips, K, C, H, W) in [-1, 1], whole windows.
        given: G, how many of their frames are observed.
        sampling: how.
        seed: of the noise; a clip's f-th future depends on the seed, f and the clip's number only.
        futures: how often each clip is continued.
        max_batch: windows in one network call.
    """
    count, window = true.shape[:2]
    plan = prediction_plan(window, given)
    observed = {frame: true[:, frame] for frame in range(given)}
    with_ssim = min(true.shape[-2:]) >= metrics.SSIM_WINDOW
    horizon = window - given

    def look(frames: Tensor, ahead: int) -> Tensor:
        """Error, similarity and sharpness of a frame of each clip, (3, clips)."""
        true_frames = unit(true[:, given + ahead])
        similarity = metrics.ssim(frames, true_frames) if with_ssim else torch.full((count,), math.nan)
        return torch.stack([metrics.squared_error(frames, true_frames), similarity, metrics.sharpness(frames)])

    found = torch.zeros(futures, 3, count, horizon)
    calls = before = 0
    for future in range(futures):
        frame = 0
        of_future = derive_seed(seed, "future", future)
        for update in rollout.run(
            checkpoint, plan, sampling, seed=of_future, samples=count, given=observed, max_batch=max_batch
        ):
            for made in update.frames:
                if frame >= given:
                    found[future, ..., frame - given] = look(unit(made), frame - given)
                frame += 1
            calls = before + update.network_calls
            yield calls
        before = calls
    true_sharpness = torch.stack([metrics.sharpness(unit(true[:, frame])) for frame in range(given, window)], dim=1)
    errors, similarities, _ = found.mean(3).unbind(1)  # (futures, clips)
    best = found[errors.argmin(0), :, torch.arange(count)].transpose(0, 1).contiguous()  # (3, clips, horizon)
    best[1] = found[similarities.argmax(0), 1, torch.arange(count)]

    def quality(frames: Sequence[Tensor]) -> Quality:
        looks = [look(unit(frame), ahead) for ahead, frame in enumerate(frames)]
        return _quality(torch.stack(looks, dim=2), true_sharpness, with_ssim)

    drafts = _drafts(checkpoint, true, given, max_batch)
    return Prediction(
        _quality(found.mean(0), true_sharpness, with_ssim),
        _quality(best, true_sharpness, with_ssim),
        quality([true[:, given - 1]] * horizon),
        quality([true[:, :given].mean(1)] * horizon),
        None if drafts is None else quality(drafts.unbind(1)),
    )


@torch.inference_mode()
def _drafts(checkpoint: Checkpoint, true: Tensor, given: int, max_batch: int) -> Tensor | None:
    """(clips, K - given, C, H, W) in [-1, 1], of windows (clips, K, C, H, W); None where the model makes none."""
    model = checkpoint.model
    device = next(model.parameters()).device
    made = []
    for x_0 in torch.split(true, max_batch):
        indices = torch.arange(true.shape[1], device=device).expand(len(x_0), -1)
        window = Window.of(indices, indices < given, indices >= given)
        drafts = model.drafts(x_0.to(device), indices, window)
        if drafts is None:
            return None
        made.append(drafts.frames.view(len(x_0), -1, *true.shape[2:]).cpu())
    return torch.cat(made)


def _quality(found: Tensor, true_sharpness: Tensor, with_ssim: bool) -> Quality:
    """From errors, similarities and sharpnesses (3, clips, H), and what the last should be."""
    errors, similarities, sharpness = found
    return Quality(
        psnr=[metrics.psnr(error) for error in errors.double().mean(0).tolist()],
        psnr_all=metrics.psnr(float(errors.double().mean())),
        ssim=similarities.mean(0).tolist() if with_ssim else None,
        ssim_all=float(similarities.mean()) if with_ssim else None,
        sharpness=(sharpness.mean(0) / true_sharpness.mean(0)).tolist(),
        sharpness_all=float(sharpness.mean() / true_sharpness.mean()),
    )


def measure_bound(
    checkpoint: Checkpoint, true: Tensor, given: int, timesteps: Sequence[int], *, seed: int, max_batch: int
) -> Generator[int, None, Bound]:
    """The bound on the frames of windows that follow the given ones; see `bound` for the conventions.

    Args:
        checkpoint: the model; guidance is no part of the bound.
        true: (clips, K, C, H, W) in [-1, 1], whole windows.
        given: G, how many of their frames are observed.
        timesteps: at least two of 0..T-1; two figures compare only if these are the same.
        seed: of the noise, which belongs to (seed, clip, timestep).
        max_batch: windows in one network call.

    Raises:
        RunFailed: the model's estimates are not numbers.
    """
    respaced = Respaced.of(checkpoint.process, timesteps)
    device = next(checkpoint.model.parameters()).device
    count, window = true.shape[:2]
    nats = torch.zeros(len(respaced.timesteps), dtype=torch.float64)
    prior, calls = 0.0, 0
    for start in range(0, count, max_batch):
        x_0 = true[start : start + max_batch]
        places = torch.arange(window).expand(len(x_0), -1)
        observed = places < given
        latent_x_0 = x_0[:, given:].double()
        prior += float(respaced.prior(latent_x_0).mean(dim=(1, 2, 3, 4)).sum())
        with torch.inference_mode():
            clean, indices, mask = (tensor.to(device) for tensor in (x_0, places, observed))
            denoise = denoiser(checkpoint, clean, indices, mask, ~mask, guidance=1.0)
            for i, t in enumerate(respaced.timesteps):
                draws = [generator(seed, "bound", start + row, t) for row in range(len(x_0))]
                eps = torch.stack([torch.randn(x_0.shape[1:], generator=draw) for draw in draws])
                timestep = torch.full((len(x_0),), t)
                x_t = checkpoint.process.q_sample(x_0, timestep, eps)
                output = denoise(x_t.to(device), timestep.to(device)).cpu()
                estimate = checkpoint.process.predict_x_0(x_t, timestep, output)
                if not estimate.isfinite().all():
                    raise not_numbers()
                latents = (tensor[:, given:].double() for tensor in (x_t, estimate))
                nats[i] += respaced.term(i, latent_x_0, *latents).mean(dim=(1, 2, 3, 4)).sum()
                calls += 1
                yield calls
    terms = (nats / count / math.log(2)).tolist()
    prior = prior / count / math.log(2)
    return Bound(sum(terms) + prior, prior, sum(terms[1:]), terms[0], respaced.timesteps, terms)


def real_statistics(
    videos: Iterator[Tensor], network: VideoFeatures | None
) -> Generator[int, None, tuple[Statistics, Tensor | None]]:
    """The statistics of real videos (N, C, H, W) in [-1, 1], all of one length, and their features (videos, F)."""
    rows, features = [], []
    for video in videos:
        rows.append(torch.cat([_seen(video, start) for start in range(0, len(video), AT_ONCE)], dim=1))
        if network is not None:
            features.append(network(unit(video)))
        yield len(rows)
    return _statistics(torch.stack(rows, dim=1)), torch.stack(features) if features else None


def _seen(video: Tensor, start: int) -> Tensor:
    """The statistics of the frames of a video from `start` on, at most AT_ONCE, (5, n)."""
    frames = unit(video[max(0, start - REMEMBERED) : start + AT_ONCE])
    changed = metrics.changed_share(frames[1:], frames[:-1])
    kept = metrics.kept_share(frames[REMEMBERED:], frames[:-REMEMBERED]) if len(frames) > REMEMBERED else changed[:0]
    seen = _look(frames, *(_after_unknown(values, len(frames)) for values in (changed, kept)))
    return seen[:, min(start, REMEMBERED) :]


def _after_unknown(values: Tensor, count: int) -> Tensor:
    """The last values of `count`; what comes before them is not a number."""
    return torch.cat([torch.full((count - len(values),), math.nan), values])


def _look(frames: Tensor, changed: Tensor, kept: Tensor) -> Tensor:
    """The statistics of frames (n, C, H, W), the last two measured already, as (5, n)."""
    return torch.stack([metrics.ink(frames), metrics.grey_share(frames), metrics.sharpness(frames), changed, kept])


def _statistics(values: Tensor) -> Statistics:
    """Means of (5, videos, N) over the videos that have a value."""
    return Statistics(*values.nanmean(1).tolist())


def roll_out(
    checkpoint: Checkpoint,
    plan: Plan,
    sampling: Sampling,
    given: Mapping[int, Tensor],
    *,
    seed: int,
    samples: int,
    max_batch: int,
    choose: rollout.Choose | None,
    network: VideoFeatures | None,
) -> Generator[int, None, Drift]:
    """Makes long videos and measures every frame as it is made.

    Args:
        checkpoint: the model.
        plan: of the scheme.
        sampling: how.
        given: frame -> (samples, C, H, W), for every frame that the plan takes as given.
        seed: of the noise.
        samples: how many videos.
        max_batch: windows in one network call.
        choose: for adaptive schemes.
        network: gives features for the Frechet video distance; None measures none.
    """
    rows: list[Tensor] = []  # (5, samples) a frame
    before: deque[Tensor] = deque(maxlen=REMEMBERED)
    whole: list[Tensor] = []  # (samples, C, H, W) uint8; only where the videos are needed as a whole
    calls, began = 0, time.perf_counter()
    for update in rollout.run(
        checkpoint, plan, sampling, seed=seed, samples=samples, given=given, max_batch=max_batch, choose=choose
    ):
        for frame in update.frames:
            seen = unit(frame)
            changed = kept = torch.full((samples,), math.nan)
            if before:
                changed = metrics.changed_share(seen, before[-1])
            if len(before) == REMEMBERED:
                kept = metrics.kept_share(seen, before[0])
            rows.append(_look(seen, changed, kept))
            before.append(seen)
            if network is not None:
                whole.append((seen * 255).round().byte())
        calls = update.network_calls
        yield calls
    seconds = time.perf_counter() - began
    features = None
    if network is not None:
        videos = torch.stack(whole, dim=1)
        features = torch.stack([network(video.float() / 255) for video in videos])
    made = [frame for frame in range(plan.length) if plan.makers[frame] >= 0]
    return Drift(_statistics(torch.stack(rows, dim=2)), made[:ENDS], made[-ENDS:], calls, seconds, features)
