import errno
import itertools
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fdm_cli import config as configuration
from fdm_cli import run_folder
from fdm_cli.config import Config
from fdm_cli.dataset import open_clips
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput, Interrupted, RunFailed
from fdm_cli.run_folder import RunFolder
from fdm_cli.signals import StopSignals
from fdm_cli.trainer import Trainer, learning_rate, train


def make(*overrides) -> Trainer:
    config = configuration.load_preset("micro", overrides)
    return Trainer(config, open_clips(config), torch.device("cpu"))


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.slow
def test_the_loss_falls():
    trainer = make()
    losses = [trainer.train_step()[0] for _ in range(20)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.slow
def test_state_goes_on_bit_for_bit():
    straight = make()
    for _ in range(6):
        straight.train_step()
    first = make()
    for _ in range(3):
        first.train_step()
    second = make()
    second.load(first.state())
    torch.rand(5)  # somebody else's random numbers change nothing
    for _ in range(3):
        second.train_step()
    for mine, other in zip(weights(second), weights(straight), strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(second.ema.parameters(), straight.ema.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("setting", ["model.num_heads=2", "diffusion.parameterization=x_0"])
def test_a_checkpoint_of_another_network_or_process_is_not_gone_on_with(setting):
    state = make().state()
    with pytest.raises(BadInput, match=f"another {setting.partition('=')[0]}"):
        make(setting).load(state)


def test_a_loss_that_is_not_a_number_changes_no_weights():
    trainer = make()
    trainer.train_step()
    before = weights(trainer)
    trainer.process.betas[:] = torch.nan
    trainer.process.alphas_cumprod[:] = torch.nan
    loss, _ = trainer.train_step()
    assert loss != loss
    assert trainer.step == 2
    for mine, other in zip(weights(trainer), before, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.slow
def test_parts_of_a_step_add_up_to_the_whole():
    whole, parts = make(), make("training.accumulation=4")
    for _ in range(3):
        assert whole.train_step() == pytest.approx(parts.train_step(), rel=1e-4)
    for mine, other in zip(weights(whole), weights(parts), strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing():
    plain, checkpointing = (
        make("model.dropout=0.1"),
        make("model.dropout=0.1", "training.activation_checkpointing=true"),
    )
    for _ in range(2):
        assert plain.train_step() == checkpointing.train_step()
    for mine, other in zip(weights(plain), weights(checkpointing), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_half_precision_stays_close_and_goes_on_bit_for_bit(precision):
    full, half = make(), make(f"training.precision={precision}")
    for _ in range(3):
        assert half.train_step() == pytest.approx(full.train_step(), rel=0.1)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    again = make(f"training.precision={precision}")
    again.load(half.state())
    assert half.train_step() == again.train_step()
    assert again.scaler.state_dict() == half.scaler.state_dict()
    assert bool(half.scaler.state_dict()) == (precision == "fp16")


def test_the_learning_rate_rises_and_falls():
    training = configuration.load_preset("micro", ["training.warmup_steps=4", "training.steps=12"]).training
    rate = training.learning_rate
    assert [learning_rate(training, step) for step in (0, 3, 4, 11)] == [rate / 4, rate, rate, rate]
    for schedule, half in (("linear", 0.5), ("cosine", 0.5)):
        falling = [learning_rate(replace(training, schedule=schedule), step) / rate for step in range(13)]
        assert falling[3] == falling[4] == 1
        assert falling[8] == pytest.approx(half)
        assert falling[4:] == sorted(falling[4:], reverse=True)
        assert falling[12] == pytest.approx(0)


@pytest.mark.parametrize("weighting", ["min-snr", "x_0"])
@pytest.mark.parametrize("parameterization", ["eps", "v", "x_0"])
def test_weightings_weigh_the_error_in_x_0_alike_in_every_parameterization(parameterization, weighting):
    process = Process(replace(Config().diffusion, parameterization=parameterization))
    timestep = torch.tensor([0, 100, 300, 999])
    shape = (4, 2, 1, 3, 3)
    draws = torch.Generator().manual_seed(0)
    x_0, eps, error = (torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(3))
    x_t = process.q_sample(x_0, timestep, eps)
    # An output whose estimate of x_0 is off by `error`.
    output = process.target(x_0, timestep, eps)
    slope = process.predict_x_0(x_t, timestep, output + 1) - process.predict_x_0(x_t, timestep, output)
    losses = process.loss(x_0, timestep, eps, output + error / slope, torch.ones(4, 2, dtype=torch.bool))
    snr = process.alphas_cumprod[timestep] / (1 - process.alphas_cumprod[timestep])
    expected = error.square().mean(dim=(1, 2, 3, 4)) * (snr.clamp(max=5) if weighting == "min-snr" else 1)
    assert torch.allclose(process.loss_weight(weighting, timestep).double() * losses, expected, rtol=1e-4)


def test_a_run_folder_that_cannot_be_completed_is_not_left_behind(tmp_path, monkeypatch):
    made = Path.mkdir

    def full(path, *mode, **options):
        if path.name == "checkpoints":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        made(path, *mode, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(BadInput, match="No space left"), RunFolder(tmp_path / "runs" / "run").locked():
        pass
    assert not list(tmp_path.iterdir())


def test_a_preview_that_fails_ends_nothing(tmp_path):
    trainer = make("training.steps=2", "training.preview_every=1", "training.held_out_every=0")
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.sample_path(1).parent.write_text("in the way")
        stats = list(train(trainer, folder, StopSignals()))
    assert [one.step for one in stats] == [1, 2]
    assert all(one.preview is None and "exists" in one.no_picture for one in stats)
    assert len(folder.checkpoints()) == 1


@pytest.mark.slow
def test_a_curve_that_cannot_be_drawn_ends_nothing(tmp_path):
    trainer = make("training.steps=2", "training.checkpoint_every=1", "training.held_out_every=0")
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        (folder.path / "loss.png").mkdir()
        stats = list(train(trainer, folder, StopSignals()))
    assert [one.step for one in stats] == [1, 2]
    assert all("loss.png" in one.no_picture for one in stats)
    assert len(folder.checkpoints()) == 2


def test_metrics_are_read_whatever_a_crash_left(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(b'{"step": 1, "loss": 0.5}\n\xff\xfe\n{"step": 2, "loss": 0.4}\n{"step": 3, "lo')
    assert [record["step"] for record in folder.read_metrics()] == [1, 2]
    folder.forget_metrics_after(1)
    assert folder.metrics.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_the_curve_of_a_long_run_is_thinned_out():
    points = run_folder._Points()
    for step in range(100_000):
        points.add(step, step / 2)
    assert run_folder.MOST_POINTS / 2 <= len(points.kept) <= run_folder.MOST_POINTS
    assert len({later - step for (step, _), (later, _) in itertools.pairwise(points.kept)}) == 1
    assert points.kept[0] == (0, 0.0)


@pytest.mark.slow
def test_a_signal_in_a_bad_step_saves_what_was_reached(tmp_path, monkeypatch):
    trainer = make("training.steps=9", "training.held_out_every=0", "training.checkpoint_every=5")
    folder, stop = RunFolder(tmp_path / "run"), StopSignals()
    real = trainer.train_step

    def step():
        loss, norm = real()
        if trainer.step == 3:
            stop.received = signal.SIGINT
            return math.nan, norm
        return loss, norm

    monkeypatch.setattr(trainer, "train_step", step)
    with folder.locked(), pytest.raises(Interrupted, match="saved at step 3"):
        list(train(trainer, folder, stop))
    assert [path.name for path in folder.checkpoints()] == ["step-00000003.pt"]


@pytest.mark.slow
def test_one_bad_step_of_a_run_that_goes_on_is_none_of_a_run_s_only_ones(tmp_path):
    first = make("training.steps=2", "training.held_out_every=0")
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        list(train(first, folder, StopSignals()))
        second = make("training.steps=3", "training.held_out_every=0")
        second.load(first.state())
        second.process.alphas_cumprod[:] = torch.nan
        list(train(second, folder, StopSignals()))
    assert [path.name for path in folder.checkpoints()] == ["step-00000002.pt", "step-00000003.pt"]


def test_steps_that_are_all_bad_are_no_success_however_few(tmp_path):
    trainer = make("training.steps=2", "training.held_out_every=0", "training.learning_rate=0.001")
    trainer.process.alphas_cumprod[:] = torch.nan
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(RunFailed, match="in 2 steps in a row, up to step 2"):
        list(train(trainer, folder, StopSignals()))
    assert folder.checkpoints() == []


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_a_checkpoint_whose_content_does_not_fit_is_bad_input(part):
    trainer = make()
    state = trainer.state()
    if part == "optimizer":
        state[part] = {**state[part], "state": {0: {}}}
    else:
        state[part] = {**state[part], "out.2.weight": torch.zeros(3)}
    with pytest.raises(BadInput, match=f"the checkpoint's {part} does not fit"):
        make().load(state)


def test_a_zero_gradient_with_the_smallest_epsilon_moves_nothing():
    trainer = make("training.adam_epsilon=1e-16")
    before = weights(trainer)
    trainer.train_step()
    still = [(p.grad == 0).all().item() for p in trainer.model.parameters()]
    assert any(still)  # those before a layer that begins with zeros
    for value, old, unmoved in zip(weights(trainer), before, still, strict=True):
        assert value.isfinite().all()
        assert torch.equal(value, old) == unmoved
    with pytest.raises(BadInput, match="adam_epsilon"):
        make("training.adam_epsilon=0")


def test_what_a_user_edits_between_two_parts_of_a_run_counts():
    first = make("training.precision=fp32")
    first.train_step()
    second = make("training.precision=bf16", "training.weight_decay=0.5", "training.adam_epsilon=0.1")
    edited = {remark.split()[0] for remark in second.load(first.state())}
    assert edited == {"training.weight_decay", "training.adam_epsilon"}
    assert {(group["weight_decay"], group["eps"]) for group in second.optimizer.param_groups} == {(0.5, 0.1)}
    third = make("training.precision=fp16")
    third.load(first.state())
    assert third.scaler.state_dict()["scale"] > 1
