import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from fdm_cli import batch, rollout, samplers, scheme
from fdm_cli import config as configuration
from fdm_cli import plan as planning
from fdm_cli.batch import Sampling
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.cli.plan_report import as_data
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.unet import UNet
from fdm_cli.work_folder import WorkFolder
from tests.conftest import ROOT
from tests.networks import randomise


def random_checkpoint():
    """`micro` at 8 x 8 pixels with weights that are random everywhere, so that nothing is hidden by a zero."""
    config = configuration.load_preset("micro", ["model.image_size=8", "model.attention_resolutions=[4, 2]"])
    torch.manual_seed(0)
    model = UNet(config).eval()
    randomise(model)
    return Checkpoint(config, 0, Process(config.diffusion), model, "0" * 64, "fdm", resumable=False)


@pytest.fixture(scope="module")
def checkpoint():
    return random_checkpoint()


def sampling(steps=2, guidance=1.0):
    return Sampling(samplers.make("ddim"), samplers.choose_timesteps(1000, steps), guidance)


def test_the_work_of_a_plan_is_that_of_its_windows():
    """However they are put into batches; guidance has more batches, of one shape each."""
    for name in ("keyframes", "autoregressive", "hierarchy-2"):
        plan = planning.make(scheme.load(name), length=160)
        frames = sum(stage.observed_count + len(stage.latent) for stage in plan.stages)
        for max_batch in (1, 4, 64):
            assert rollout.frames_computed(plan, sampling(3, guidance=1.5), 2, max_batch) == 3 * 2 * frames


def make(checkpoint, name, length, given=None, **options):
    """All frames (S, N, C, H, W) of a scheme's video, and the calls it took."""
    spans = [(min(given), max(given) + 1)] if given else []
    plan = planning.make(scheme.load(name), length=length, given=spans)
    updates = list(rollout.run(checkpoint, plan, options.pop("sampling", sampling()), seed=3, given=given, **options))
    frames = [frame for update in updates for frame in update.frames]
    assert len(frames) == length
    assert updates[-1].windows == plan.calls * options.get("samples", 1)
    return torch.stack(frames, dim=1), updates[-1].network_calls


@pytest.mark.parametrize("name", ["autoregressive", "long-range", "hierarchy-2", "keyframes", "single", "loop"])
def test_every_frame_is_made_once_and_comes_in_order(checkpoint, name):
    length = 16 if name == "single" else 40
    frames, _ = make(checkpoint, name, length)
    assert torch.isfinite(frames).all()
    assert frames.abs().max() <= 1
    assert len({frame.numpy().tobytes() for frame in frames[0]}) == length


def test_waves_run_as_batches_and_give_what_single_stages_give(checkpoint):
    batched, calls = make(checkpoint, "keyframes", 160)
    assert calls == 2 * 2  # two waves; in the second one, gaps of two lengths leave room for 6 or 7 observed frames
    alone, many = make(checkpoint, "keyframes", 160, max_batch=1)
    assert many == 16 * 2
    torch.testing.assert_close(batched, alone, atol=1e-4, rtol=0)


GAPS = """
name: gaps
about: The gaps between sixteen frames, each from its two ends alone.
length: 160
window: 16
step: 8
start: spread
rounds:
  - generate: gaps
    parallel: true
    observe:
      - before: 1
      - after: 1
"""


def test_windows_of_different_lengths_share_a_batch(checkpoint, tmp_path):
    (tmp_path / "gaps.yaml").write_text(GAPS)
    plan = planning.make(scheme.load(str(tmp_path / "gaps.yaml")))
    assert {stage.observed_count + len(stage.latent) for stage in plan.stages} == {16, 12, 11}
    batched, calls = make(checkpoint, str(tmp_path / "gaps.yaml"), 160)
    assert calls == 2 * 2
    alone, _ = make(checkpoint, str(tmp_path / "gaps.yaml"), 160, max_batch=1)
    torch.testing.assert_close(batched, alone, atol=1e-4, rtol=0)


HALVES = """
length: 30
start: contiguous
rounds:
  - {generate: {frames: "16:26"}, observe: [frames: "0:6"]}
  - {generate: {frames: "26:30"}, observe: [frames: "0:4"]}
"""


def test_much_shorter_windows_and_guided_ones_of_another_shape_are_not_padded(checkpoint, tmp_path, monkeypatch):
    sizes = []
    sample_batch = rollout.sample_batch

    def watched(checkpoint, plan, jobs, *rest):
        sizes.append([job.stage.observed_count + len(job.stage.latent) for job in jobs])
        shapes.append({job.stage.observed_count for job in jobs})
        return sample_batch(checkpoint, plan, jobs, *rest)

    monkeypatch.setattr(rollout, "sample_batch", watched)
    shapes = []
    (tmp_path / "halves.yaml").write_text(HALVES)
    _, calls = make(checkpoint, str(tmp_path / "halves.yaml"), 30)
    assert sorted(map(sorted, sizes)) == [[8], [16], [16]]
    assert calls == 3 * 2
    make(checkpoint, "keyframes", 33)
    assert any(len(observed) > 1 for observed in shapes)
    shapes = []
    make(checkpoint, "keyframes", 33, sampling=sampling(guidance=1.5))
    assert all(len(observed) == 1 for observed in shapes)


def test_network_calls_are_those_of_the_network(checkpoint):
    """Guidance makes a second one a step, but not for the first window, which observes nothing."""
    seen = []
    hook = checkpoint.model.register_forward_hook(lambda *_: seen.append(1))
    for guidance, expected in ((1.0, 3 * 2), (1.5, (1 + 2 * 2) * 2)):
        seen.clear()
        _, calls = make(checkpoint, "autoregressive", 32, sampling=sampling(guidance=guidance))
        assert calls == len(seen) == expected
    hook.remove()


def test_a_sample_does_not_depend_on_its_neighbours(checkpoint):
    three, _ = make(checkpoint, "autoregressive", 24, samples=3)
    one, _ = make(checkpoint, "autoregressive", 24)
    torch.testing.assert_close(three[:1], one, atol=1e-4, rtol=0)
    assert not torch.allclose(three[0], three[1], atol=0.1)


def test_given_frames_stay_and_matter(checkpoint):
    given = {frame: torch.full((1, 8, 8), frame / 10) for frame in range(8)}
    frames, _ = make(checkpoint, "autoregressive", 20, given=given)
    assert torch.equal(frames[0, :8], torch.stack(list(given.values())))
    other, _ = make(checkpoint, "autoregressive", 20, given={frame: -value for frame, value in given.items()})
    assert not torch.allclose(frames[:, 8:], other[:, 8:], atol=1e-2)


def test_given_frames_must_be_those_of_the_plan(checkpoint):
    plan = planning.make(scheme.load("autoregressive"), length=20, given=[(0, 4)])
    with pytest.raises(BadInput, match="given frames"):
        next(rollout.run(checkpoint, plan, sampling(), seed=0, given={0: torch.zeros(1, 8, 8)}))


@pytest.mark.parametrize("name", ["adaptive-autoregressive", "adaptive-hierarchy-2"])
def test_observed_frames_may_be_chosen_at_run_time(checkpoint, name):
    plan = planning.make(scheme.load(name), length=40)
    chosen = {}

    def choose(number, sample, store):
        """The frames always observed, and the oldest candidates or, for the second sample, the newest."""
        choice = plan.stages[number].choice
        known = [f for f in range(40) if plan.makers[f] < choice.among and f not in choice.always]
        assert all(store.get(frame, sample).any() for frame in known)
        assert (number, sample) not in chosen
        more = plan.stages[number].observed_count - len(choice.always)
        chosen[number, sample] = (*choice.always, *(known[len(known) - more :] if sample else known[:more]))
        return chosen[number, sample]

    updates = list(rollout.run(checkpoint, plan, sampling(), seed=3, samples=2, choose=choose))
    executed = {(job.number, job.sample): job.observed for update in updates for job in update.executed}
    for number, stage in enumerate(plan.stages):
        for sample in (0, 1):
            assert executed.pop((number, sample)) == (stage.observed or tuple(sorted(chosen.pop((number, sample), ()))))
    assert not executed
    assert not chosen


def test_a_plan_with_choices_needs_someone_to_make_them(checkpoint):
    plan = planning.make(scheme.load("adaptive-autoregressive"), length=40)
    with pytest.raises(BadInput, match="chooses observed frames by their looks"):
        list(rollout.run(checkpoint, plan, sampling(), seed=3))
    with pytest.raises(ValueError, match="must observe 8 of"):
        list(rollout.run(checkpoint, plan, sampling(), seed=3, choose=lambda *_: range(20, 28)))


class Stopped(Exception):
    pass


def interrupted(checkpoint, folder, name, windows, **options):
    """Runs in the work folder until so many windows are finished, then stops in the middle of the next batch."""
    plan = planning.make(scheme.load(name), length=60)
    work = WorkFolder(folder / "video.gif")
    updates = []
    with contextlib.suppress(Stopped), work.opened({}, work.facts() is not None, "a.pt"):
        for update in rollout.run(checkpoint, plan, sampling(3), seed=3, max_batch=2, work=work, **options):
            updates.append(update)
            if update.windows >= windows and update.steps == 2:
                raise Stopped
    return updates


def finished(checkpoint, folder, name, **options):
    """Goes on to the end: all frames (S, N, C, H, W), and the updates."""
    plan = planning.make(scheme.load(name), length=60)
    work = WorkFolder(folder / "video.gif")
    with work.opened({}, work.facts() is not None, "a.pt"):
        updates = list(rollout.run(checkpoint, plan, sampling(3), seed=3, max_batch=2, work=work, **options))
    return torch.stack([frame for update in updates for frame in update.frames], dim=1), updates


class TestResuming:
    @pytest.mark.parametrize("name", ["autoregressive", "hierarchy-2", "keyframes"])
    @pytest.mark.slow
    def test_the_very_same_bits(self, checkpoint, tmp_path, name):
        whole, _ = finished(checkpoint, tmp_path, name, samples=2)
        interrupted(checkpoint, tmp_path, name, windows=3, samples=2)
        again = interrupted(checkpoint, tmp_path, name, windows=7, samples=2)
        assert [update.replayed for update in again if update.executed][:2] == [True, True]
        frames, updates = finished(checkpoint, tmp_path, name, samples=2)
        assert torch.equal(frames, whole)
        assert sum(len(update.executed) for update in updates if update.replayed) >= 7
        assert not (tmp_path / ".video.gif.work").exists()

    def test_what_is_finished_is_not_made_again(self, checkpoint, tmp_path, monkeypatch):
        interrupted(checkpoint, tmp_path, "autoregressive", windows=4)
        calls = []
        forward = UNet.forward
        monkeypatch.setattr(UNet, "forward", lambda *a, **o: calls.append(1) or forward(*a, **o))
        _, updates = finished(checkpoint, tmp_path, "autoregressive")
        assert len(calls) == (7 - 4) * 3
        assert all(update.replayed for update in updates if update.windows < 4)  # frames that are told of, too
        assert updates[-1].network_calls == 7 * 3

    @pytest.mark.slow
    def test_frames_that_were_not_all_written_are_made_again(self, checkpoint, tmp_path):
        whole, _ = finished(checkpoint, tmp_path, "autoregressive")
        interrupted(checkpoint, tmp_path, "autoregressive", windows=4)
        file = tmp_path / ".video.gif.work" / "frames.f32"
        content = bytearray(file.read_bytes())
        content[30 * 256 + 9] ^= 1  # frame 30, of the third window
        file.write_bytes(content[: 35 * 256])
        frames, updates = finished(checkpoint, tmp_path, "autoregressive")
        assert torch.equal(frames, whole)
        assert sum(len(update.executed) for update in updates if update.replayed) == 2

    def test_choices_are_remembered_not_made_again(self, checkpoint, tmp_path):
        plan = planning.make(scheme.load("adaptive-autoregressive"), length=60)
        asked = []

        def choose(number, sample, _store):
            asked.append((number, sample))
            choice = plan.stages[number].choice
            known = [f for f in range(60) if plan.makers[f] < choice.among and f not in choice.always]
            return [*choice.always, *known[-(plan.stages[number].observed_count - len(choice.always)) :]]

        earlier = interrupted(checkpoint, tmp_path, "adaptive-autoregressive", windows=4, samples=2, choose=choose)
        asked.clear()
        _, updates = finished(checkpoint, tmp_path, "adaptive-autoregressive", samples=2, choose=choose)
        executed, before = (
            {(job.number, job.sample): job.observed for update in run for job in update.executed}
            for run in (updates, earlier)
        )
        assert before.items() <= executed.items()
        assert not before.keys() & set(asked)
        assert len(executed) == 2 * plan.calls
        assert all(len(observed) == plan.stages[number].observed_count for (number, _), observed in executed.items())


def test_frames_that_are_not_numbers_end_the_run(tmp_path):
    broken = random_checkpoint()
    torch.nn.init.constant_(broken.model.out[2].bias, torch.nan)
    with pytest.raises(RunFailed, match="not numbers"):
        finished(broken, tmp_path, "autoregressive")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["keyframes", "adaptive-autoregressive"])
def test_several_processes_make_the_same_video(tmp_path, name):
    saved = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.pt"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launcher, "-m", "tests.rollout_process", name, str(file)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300)
        saved.append(torch.load(file, weights_only=True))
    assert [one["processes"] for one in saved] == [1, 2]
    # Other batches round otherwise, by a few 1e-7 a call; each of the waves makes more of it.
    torch.testing.assert_close(saved[1]["frames"], saved[0]["frames"], atol=3e-4, rtol=0)


def test_the_network_gets_the_frames_that_inspect_scheme_shows(checkpoint, monkeypatch):
    """The real inputs of every call, row by row, beside the JSON of the plan."""
    seen = []
    forward = UNet.forward

    def recorded(model, x_t, timestep, **conditions):
        rows = zip(*(conditions[key] for key in ("frame_indices", "observed_mask", "latent_mask")), strict=True)
        seen.extend((indices[seen_mask].tolist(), indices[made].tolist()) for indices, seen_mask, made in rows)
        return forward(model, x_t, timestep, **conditions)

    monkeypatch.setattr(UNet, "forward", recorded)
    for name in ("autoregressive", "hierarchy-3", "keyframes", "long-range"):
        seen.clear()
        plan = planning.make(scheme.load(name), length=40)
        make(checkpoint, name, 40, sampling=sampling(steps=1))
        shown = json.loads(json.dumps(as_data(plan)))["stages"]
        assert sorted(seen) == sorted((stage["observed"], stage["latent"]) for stage in shown)


class TestGuidance:
    """eps_none + W (eps_observed - eps_none), eps_none from the latent frames alone."""

    x_t = torch.randn(1, 6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([500])

    def outputs(self, checkpoint, guidance, observed_value=0.5, rescale=0.0):
        observed = (torch.arange(6) < 2)[None]
        x_0 = torch.full_like(self.x_t, observed_value)
        denoise = batch.denoiser(checkpoint, x_0, torch.arange(6)[None], observed, ~observed, guidance, rescale)
        with torch.inference_mode():
            return denoise(self.x_t, self.timestep)[:, 2:]

    def test_w_0_does_not_look_at_observed_frames(self, checkpoint):
        torch.testing.assert_close(self.outputs(checkpoint, 0.0, 0.5), self.outputs(checkpoint, 0.0, -0.5))
        assert not torch.allclose(self.outputs(checkpoint, 1.0, 0.5), self.outputs(checkpoint, 1.0, -0.5))

    def test_it_extrapolates(self, checkpoint):
        none, plain, twice = (self.outputs(checkpoint, w) for w in (0.0, 1.0, 2.0))
        torch.testing.assert_close(twice, none + 2 * (plain - none), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("parameterization", ["eps", "v", "x_0"])
    def test_rescaled_all_the_way_each_frame_keeps_its_mean_and_deviation(self, checkpoint, parameterization):
        process = Process(dataclasses.replace(checkpoint.config.diffusion, parameterization=parameterization))
        checkpoint = dataclasses.replace(checkpoint, process=process)

        def estimates(*weights):
            output = self.outputs(checkpoint, weights[0], rescale=weights[1])
            return process.predict_x_0(self.x_t[:, 2:], self.timestep, output)

        def statistics(x_0):
            return torch.stack([x_0.mean((2, 3, 4)), x_0.std((2, 3, 4), correction=0)])

        plain, guided, half, rescaled = (estimates(*weights) for weights in [(1, 0), (3, 0), (3, 0.5), (3, 1)])
        torch.testing.assert_close(statistics(rescaled), statistics(plain), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(statistics(guided), statistics(plain), atol=1e-2)
        torch.testing.assert_close(half, (guided + rescaled) / 2, atol=1e-4, rtol=1e-4)
        # It is the guided frame with another contrast, not the plain one.
        for frame, other, unguided in zip(guided[0], rescaled[0], plain[0], strict=True):
            assert torch.corrcoef(torch.stack([frame.flatten(), other.flatten()]))[0, 1] > 0.9999
            assert not torch.allclose(other, unguided, atol=1e-2)

    def test_a_frame_without_any_contrast_can_be_rescaled(self):
        flat = torch.zeros(1, 2, 1, 8, 8)
        made = batch._rescaled(Process(configuration.DiffusionConfig(parameterization="x_0")), flat, self.timestep,
                               flat + 0.5, flat + 0.25, 1.0)  # fmt: skip
        torch.testing.assert_close(made, flat + 0.25)

    def test_the_second_call_sees_latent_frames_only_and_w_1_has_none(self, checkpoint, monkeypatch):
        windows = []
        forward = UNet.forward

        def counted(model, x_t, *arguments, **options):
            windows.append(x_t.shape[1])
            return forward(model, x_t, *arguments, **options)

        monkeypatch.setattr(UNet, "forward", counted)
        self.outputs(checkpoint, 1.5)
        self.outputs(checkpoint, 1.0)
        assert windows == [6, 4, 6]


@pytest.mark.parametrize(("name", "given"), [("autoregressive", 0), ("keyframes", 0), ("hierarchy-2", 0), ("loop", 8)])
def test_no_window_has_more_distances_than_is_said(checkpoint, monkeypatch, name, given):
    seen = []
    window_of = batch.Window.of

    def watched(*arguments, **options):
        window = window_of(*arguments, **options)
        seen.extend(window.distances.clip.bincount().tolist())
        return window

    monkeypatch.setattr(batch.Window, "of", staticmethod(watched))
    frames = {frame: torch.zeros(1, 8, 8) for frame in range(given)}
    make(checkpoint, name, 60, given=frames, samples=2, max_batch=64, sampling=sampling(1))
    plan = planning.make(scheme.load(name), length=60, given=[(0, given)] if given else [])
    assert max(seen) == batch.most_distances(plan)
