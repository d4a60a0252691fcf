import pytest
import torch

from fdm_cli import config as configuration
from fdm_cli import plan as planning
from fdm_cli import rollout, samplers, scheme
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput
from fdm_cli.rollout import Sampling
from fdm_cli.unet import UNet


@pytest.fixture(scope="module")
def checkpoint():
    """`micro` at 8 x 8 pixels with weights that are random everywhere, so that nothing is hidden by a zero."""
    config = configuration.load_preset("micro", ["model.image_size=8", "model.attention_resolutions=[4, 2]"])
    torch.manual_seed(0)
    model = UNet(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return Checkpoint(config, 0, Process(config.diffusion), model, "0" * 64, "fdm", resumable=False)


def sampling(steps=2, guidance=1.0):
    return Sampling(samplers.make("ddim"), samplers.choose_timesteps(1000, steps), guidance)


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
        known = [f for f in range(40) if plan.maker(f) < choice.among and f not in choice.always]
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


class TestGuidance:
    """eps_none + W (eps_observed - eps_none), eps_none from the latent frames alone."""

    def outputs(self, checkpoint, guidance, observed_value=0.5):
        x = torch.randn(1, 6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        observed = (torch.arange(6) < 2)[None]
        x_0 = torch.full_like(x, observed_value)
        denoise = rollout._denoiser(checkpoint.model, x_0, torch.arange(6)[None], observed, ~observed, guidance)
        with torch.inference_mode():
            return denoise(x, torch.tensor([500]))[:, 2:]

    def test_w_0_does_not_look_at_observed_frames(self, checkpoint):
        torch.testing.assert_close(self.outputs(checkpoint, 0.0, 0.5), self.outputs(checkpoint, 0.0, -0.5))
        assert not torch.allclose(self.outputs(checkpoint, 1.0, 0.5), self.outputs(checkpoint, 1.0, -0.5))

    def test_it_extrapolates(self, checkpoint):
        none, plain, twice = (self.outputs(checkpoint, w) for w in (0.0, 1.0, 2.0))
        torch.testing.assert_close(twice, none + 2 * (plain - none), atol=1e-5, rtol=1e-4)

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
