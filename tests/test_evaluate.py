import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from fdm_cli import config as configuration
from fdm_cli import evaluate, given, metrics, rollout, scheme
from fdm_cli import plan as planning
from fdm_cli.batch import Sampling
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.dataset import open_clips
from fdm_cli.diffusion import Process
from fdm_cli.draft import Alike
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.evaluate import held_out_clips, measure_bound, predict, real_statistics, roll_out
from fdm_cli.unet import UNet
from tests.networks import randomise

SETTINGS = ("model.window=6", "data.clip_length=8", "diffusion.parameterization=x_0")
GIVEN = 2


class Grey(torch.nn.Module):
    """Says that every frame is grey."""

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t, *_, **__):
        return torch.zeros_like(x_t)

    def drafts(self, *_):
        return None


def checkpoint_of(model=None):
    """`micro` with this model, or with weights that are random everywhere."""
    config = configuration.load_preset("micro", SETTINGS)
    if model is None:
        torch.manual_seed(0)
        model = UNet(config).eval()
        randomise(model)
    return Checkpoint(config, 1, Process(config.diffusion), model, sha256="", format="fdm", resumable=False)


def windows(count, length=6):
    clips = open_clips(configuration.load_preset("micro", SETTINGS), "held-out")
    return torch.stack(list(held_out_clips(clips, "window", count, length)))


def result(work):
    """What a measurement returns, and the calls that it counted."""
    calls = 0
    while True:
        try:
            calls = next(work)
        except StopIteration as stop:
            return stop.value, calls


DDIM = Sampling.of("ddim", 2, 1.0, 1000)


def test_clips_are_numbered_and_do_not_depend_on_how_many_there_are():
    assert torch.equal(windows(2), windows(5)[:2])
    assert torch.equal(windows(2), windows(2, 9)[:, :6])
    assert not torch.equal(windows(2)[0], windows(2)[1])


def test_held_out_clips_longer_than_those_that_the_model_was_trained_on(tmp_path):
    """The split stays that of training: what is held out is not what would be if only long clips counted."""
    for number, frames in enumerate([40] * 20 + [9, 12]):
        np.save(tmp_path / f"{number:02}.npy", np.full((frames, 16, 16), 10 * number, np.uint8))
    config = configuration.load_preset("micro", (*SETTINGS, f"data.source={tmp_path}"))
    clips = open_clips(config, "held-out")
    assert (clips.longest, clips.clip_length) == (12, 8)
    assert {float(clip.mean()) for clip in held_out_clips(clips, "x", 20, 12)} == {np.float32(210 / 127.5 - 1)}
    assert len({float(clip.mean()) for clip in held_out_clips(clips, "x", 20, 6)}) == 2
    with pytest.raises(BadInput, match="no held-out clip has 13 frames; the longest has 12"):
        next(held_out_clips(clips, "x", 1, 13))


def test_a_grey_prediction_and_the_baselines_have_known_errors():
    true = windows(5)
    found, calls = result(predict(checkpoint_of(Grey()), true, GIVEN, DDIM, seed=1, futures=1, max_batch=2))
    assert calls == 3 * 2
    pixels = (true.numpy() + 1) / 2
    rest = pixels[:, GIVEN:]

    def expected(frames):
        error = ((frames - rest) ** 2).mean(axis=(0, 2, 3, 4))
        return pytest.approx(-10 * np.log10(error), abs=1e-4), pytest.approx(-10 * np.log10(error.mean()), abs=1e-4)

    for quality, frames in (
        (found.model, 0.5),
        (found.best, 0.5),
        (found.copy_last, pixels[:, GIVEN - 1 : GIVEN]),
        (found.mean_given, pixels[:, :GIVEN].mean(1, keepdims=True)),
    ):
        each, whole = expected(frames)
        assert quality.psnr == each
        assert quality.psnr_all == whole
    assert found.model.sharpness == [0, 0, 0, 0]
    energy = [float(metrics.sharpness(torch.tensor(part)).mean()) for part in (pixels[:, GIVEN - 1], pixels[:, 4])]
    assert found.copy_last.sharpness[2] == pytest.approx(energy[0] / energy[1], rel=1e-5)
    grey = torch.full((5, 4, 1, 16, 16), 0.5)
    assert found.model.ssim_all == pytest.approx(float(metrics.ssim(grey, torch.tensor(rest)).mean()), abs=1e-5)


def test_predictions_do_not_depend_on_the_batch_and_more_futures_are_better_at_best():
    checkpoint, true = checkpoint_of(), windows(3)
    few, _ = result(predict(checkpoint, true, GIVEN, DDIM, seed=1, futures=1, max_batch=3))
    again, calls = result(predict(checkpoint, true, GIVEN, DDIM, seed=1, futures=4, max_batch=2))
    assert calls == 4 * 2 * 2
    assert few.best == few.model
    assert again.best.psnr_all > again.model.psnr_all
    assert again.best.psnr_all >= few.model.psnr_all
    assert again.copy_last == few.copy_last
    one, _ = result(predict(checkpoint, true, GIVEN, DDIM, seed=1, futures=1, max_batch=1))
    assert one.model.psnr == pytest.approx(few.model.psnr, abs=1e-3)
    other, _ = result(predict(checkpoint, true, GIVEN, DDIM, seed=2, futures=1, max_batch=1))
    assert other.model.psnr_all != pytest.approx(few.model.psnr_all, abs=1e-4)


def test_the_prediction_is_what_the_rollout_makes():
    checkpoint, true = checkpoint_of(), windows(2)
    found, _ = result(predict(checkpoint, true, GIVEN, DDIM, seed=1, futures=1, max_batch=2))
    plan = evaluate.prediction_plan(6, GIVEN)
    assert [(stage.observed, stage.latent) for stage in plan.stages] == [((0, 1), (2, 3, 4, 5))]
    frames = {frame: true[:, frame] for frame in range(GIVEN)}
    seed = evaluate.derive_seed(1, "future", 0)
    made = rollout.run(checkpoint, plan, DDIM, seed=seed, samples=2, given=frames)
    frames = torch.stack([frame for update in made for frame in update.frames], dim=1)
    assert torch.equal(frames[:, :GIVEN], true[:, :GIVEN])
    error = (metrics.unit(frames) - metrics.unit(true))[:, GIVEN:].square().mean()
    assert found.model.psnr_all == pytest.approx(-10 * math.log10(float(error)), abs=1e-4)


def test_the_draft_is_measured_where_there_is_one():
    """As what it says of the given frames, in whatever batches."""
    true = windows(3)
    assert result(predict(checkpoint_of(), true, GIVEN, DDIM, seed=1, futures=1, max_batch=2))[0].draft is None
    config = configuration.load_preset("micro", (*SETTINGS, "model.draft=motion"))
    torch.manual_seed(0)
    checkpoint = dataclasses.replace(checkpoint_of(UNet(config).eval()), config=config)
    found, _ = result(predict(checkpoint, true, GIVEN, DDIM, seed=1, futures=1, max_batch=2))
    observed = (torch.arange(6) < GIVEN).expand(3, -1)
    with torch.no_grad():
        drafts = checkpoint.model.draft(true, torch.arange(6).expand(3, -1), Alike.among(observed, ~observed))
    error = (metrics.unit(drafts.frames) - metrics.unit(true[:, GIVEN:].flatten(0, 1))).square().mean()
    assert found.draft.psnr_all == pytest.approx(-10 * math.log10(float(error)), abs=1e-4)
    assert len(found.draft.psnr) == len(found.draft.sharpness) == 4


def test_frames_that_are_too_small_have_no_ssim():
    config = configuration.load_preset("micro", (*SETTINGS, "model.image_size=8", "model.attention_resolutions=[4]"))
    checkpoint = dataclasses.replace(checkpoint_of(Grey()), config=config)
    found, _ = result(predict(checkpoint, windows(2)[..., :8, :8], GIVEN, DDIM, seed=1, futures=1, max_batch=2))
    assert found.model.ssim is None
    assert found.copy_last.ssim_all is None
    assert found.model.psnr_all > 0


def test_the_bound_of_a_grey_estimate_has_a_closed_form():
    true, timesteps = windows(3), [0, 300, 999]
    found, calls = result(measure_bound(checkpoint_of(Grey()), true, GIVEN, timesteps, seed=3, max_batch=2))
    assert (calls, found.timesteps) == (2 * 3, (0, 300, 999))
    square = float(true[:, GIVEN:].double().square().mean())
    abar = [float(checkpoint_of(Grey()).process.alphas_cumprod[t]) for t in timesteps]
    for i in (1, 2):
        beta, shrink = 1 - abar[i] / abar[i - 1], (1 - abar[i - 1]) / (1 - abar[i])
        nats = 0.5 * (shrink - 1 - math.log(shrink) + abar[i - 1] * beta / (1 - abar[i]) ** 2 * square)
        assert found.terms[i] == pytest.approx(nats / math.log(2), rel=1e-6)
    assert found.prior == pytest.approx(
        0.5 * (-abar[2] - math.log(1 - abar[2]) + abar[2] * square) / math.log(2), rel=1e-6
    )
    assert found.divergence == pytest.approx(sum(found.terms[1:]))
    assert found.total == pytest.approx(found.prior + found.divergence + found.decoder)


def test_a_model_that_estimates_no_numbers_has_no_bound():
    class Broken(Grey):
        def forward(self, x_t, *_, **__):
            return torch.full_like(x_t, math.nan)

    with pytest.raises(RunFailed, match="not numbers"):
        result(measure_bound(checkpoint_of(Broken()), windows(1), GIVEN, [0, 500, 999], seed=0, max_batch=1))


def test_the_bound_does_not_depend_on_the_batch():
    one, many = (
        result(measure_bound(checkpoint_of(), windows(3), GIVEN, [0, 500, 999], seed=3, max_batch=batch))[0]
        for batch in (1, 3)
    )
    assert one.terms == pytest.approx(many.terms, rel=1e-4)


@pytest.mark.parametrize("wrong", [0, 6, 7])
def test_something_is_given_and_something_is_left(wrong):
    with pytest.raises(BadInput, match="given"):
        evaluate.prediction_plan(6, wrong)


def test_real_clips_are_measured_frame_by_frame():
    videos = windows(3, 7)
    (found, features), clips = result(real_statistics(iter(videos), None))
    assert clips == 3
    assert features is None
    frames = metrics.unit(videos)
    assert found.ink == pytest.approx(frames.mean(dim=(0, 2, 3, 4)).tolist())
    assert found.mean("ink") == pytest.approx(float(frames.mean()))
    assert found.mean("ink", [2, 3]) == pytest.approx(float(frames[:, 2:4].mean()))
    assert math.isnan(found.changed[0])
    changed = ((frames[:, 1:] - frames[:, :-1]).abs() > 0.1).double().mean(dim=(0, 2, 3, 4))
    assert found.changed[1:] == pytest.approx(changed.tolist())
    assert found.mean("changed") == pytest.approx(float(changed.mean()))
    assert all(map(math.isnan, found.kept))
    videos = windows(2, 20)
    (found, _), _ = result(real_statistics(iter(videos), None))
    frames = metrics.unit(videos)
    kept = torch.stack([metrics.kept_share(video[16:], video[:4]) for video in frames]).mean(0)
    assert found.kept[16:] == pytest.approx(kept.tolist())
    assert all(map(math.isnan, found.kept[:16]))


@pytest.mark.parametrize("at_once", [1, 7, 16, 33])
def test_long_clips_are_measured_a_part_at_a_time(monkeypatch, at_once):
    videos = windows(2, 40)
    (whole, _), _ = result(real_statistics(iter(videos), None))
    monkeypatch.setattr(evaluate, "AT_ONCE", at_once)
    (parts, _), _ = result(real_statistics(iter(videos), None))
    for name in evaluate.STATISTICS:
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=1e-6, nan_ok=True), name


def test_a_rollout_of_grey_frames_between_real_ones():
    """The given frames are another clip's in each video, and no part of the first and last generated frames."""
    plan = planning.make(
        scheme.load("bridge"), length=30, window=6, given=given.example(scheme.load("bridge"), length=30, window=6)
    )
    videos = windows(2, 30)
    places = plan.given_frames
    frames = {frame: videos[:, frame] for frame in places}
    found, calls = result(
        roll_out(
            checkpoint_of(Grey()), plan, DDIM, frames, seed=1, samples=2, max_batch=4, choose=None, network=None
        )
    )  # fmt: skip
    assert calls == found.network_calls == rollout.count_calls(plan, DDIM, 2, 4)
    for frame in range(30):
        expected = float(metrics.unit(videos[:, frame]).mean()) if frame in places else 0.5
        assert found.statistics.ink[frame] == pytest.approx(expected, abs=1e-6)
    inside = [frame for frame in range(30) if frame not in places]
    assert (found.first, found.last) == (inside[:10], inside[-10:])
    assert found.statistics.mean("grey", found.last) == 1
    assert found.statistics.mean("sharpness", found.last) == 0
    both = [frame for frame, before in itertools.pairwise(reversed(inside)) if frame - before == 1]
    assert found.statistics.mean("changed", both) == 0


def test_the_statistics_are_those_of_the_frames_that_the_rollout_makes():
    checkpoint = checkpoint_of()
    plan = planning.make(scheme.load("autoregressive"), length=20, window=6)
    found, _ = result(roll_out(checkpoint, plan, DDIM, {}, seed=4, samples=2, max_batch=8, choose=None, network=None))
    made = rollout.run(checkpoint, plan, DDIM, seed=4, samples=2)
    video = torch.stack([frame for update in made for frame in update.frames], dim=1)
    (expected, _), _ = result(real_statistics(iter(video), None))
    for name in evaluate.STATISTICS:
        values = getattr(found.statistics, name)
        assert values == pytest.approx(getattr(expected, name), abs=1e-6, nan_ok=True)
    assert (found.first, found.last) == (list(range(10)), list(range(10, 20)))
