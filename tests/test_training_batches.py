import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fdm_cli import config as configuration
from fdm_cli.dataset import open_clips
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.signals import StopSignals
from fdm_cli.training_batches import Ahead, AheadInProcesses, draw_batch, draw_timestep


def test_only_observed_frames_are_blurred_each_clip_by_a_share_of_its_own():
    plain, soft = (
        draw_batch(config, open_clips(config), 0, 16, 0)
        for config in (configuration.load_preset("micro", [f"training.observed_blur={most}"]) for most in (0, 0.8))
    )
    for name in ("frame_indices", "observed", "latent", "timestep", "eps"):
        assert torch.equal(getattr(soft, name), getattr(plain, name))
    assert torch.equal(soft.x_0[~plain.observed], plain.x_0[~plain.observed])
    kernel = (torch.tensor([1.0, 2.0, 1.0]) / 4).outer(torch.tensor([1.0, 2.0, 1.0]) / 4)[None, None]
    shares = []
    for before, after, observed in zip(plain.x_0, soft.x_0, plain.observed, strict=True):
        if observed.any():
            most = torch.nn.functional.conv2d(before[observed] + 1, kernel, padding=1) - 1 - before[observed]
            change = after[observed] - before[observed]
            inner = (..., slice(1, -1), slice(1, -1))
            share = float((change * most)[inner].sum() / most[inner].square().sum())
            torch.testing.assert_close(change[inner], share * most[inner], rtol=0, atol=1e-5)
            shares.append(share)
    assert 0 <= min(shares) < 0.2
    assert 0.6 < max(shares) <= 0.8


@pytest.mark.parametrize("masks", ["paper", "filled", "continued"])
def test_a_clip_belongs_to_its_number_not_to_its_batch(masks):
    config = configuration.load_preset("micro", [f"data.masks={masks}", "training.observed_blur=0.5"])
    clips = open_clips(config)
    four, two = (draw_batch(config, clips, first, size, 3) for first, size in ((8, 4), (10, 2)))
    for name, tensor in vars(four).items():
        assert torch.equal(tensor[2:], getattr(two, name)), name
    other = draw_batch(config, clips, 10, 2, 4)
    assert not torch.equal(other.eps, two.eps)
    assert not torch.equal(other.x_0, two.x_0)


def test_a_batch_is_what_the_network_takes():
    config = configuration.load_preset("micro", ["model.image_channels=3", "data.masks=filled"])
    batch = draw_batch(config, open_clips(config), 0, 2, 0)
    assert batch.x_0.shape == batch.eps.shape == (2, 16, 3, 16, 16)
    assert batch.x_0.dtype == torch.float32
    assert batch.x_0.min() >= -1
    assert batch.x_0.max() <= 1
    assert batch.frame_indices.shape == batch.observed.shape == batch.latent.shape == (2, 16)
    assert (batch.observed | batch.latent).all()
    assert batch.timestep.shape == (2,)
    assert abs(batch.eps.mean()) < 0.05
    assert abs(batch.eps.std() - 1) < 0.05


def test_clips_grow_during_training():
    sets = ["data.clip_length=160", "data.first_clip_length=10", "data.growth_steps=4", "training.batch_size=6"]
    config = configuration.load_preset("micro", sets)
    assert [config.data.spanned(step) for step in range(6)] == [10, 20, 40, 80, 160, 160]
    clips = open_clips(config)
    for step, spanned in enumerate([10, 20, 40, 80, 160, 160]):
        batch = draw_batch(config, clips, 6 * step, 6, 0)
        assert batch.frame_indices.shape == (6, min(16, spanned))
        assert spanned // 2 <= batch.frame_indices.max() < spanned


def test_windows_that_still_grow_lie_anywhere_in_a_video(tmp_path):
    frames = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 16, 16))
    np.save(tmp_path / "counting.npy", frames)
    sets = ["data.clip_length=160", "data.first_clip_length=10", "data.growth_steps=1000"]
    config = configuration.load_preset("micro", [*sets, f"data.source={tmp_path / 'counting.npy'}"])
    batch = draw_batch(config, open_clips(config), 0, 60, 0)
    last = ((batch.x_0 + 1) * 127.5).round().amax(dim=(1, 2, 3, 4))
    assert last.max() > 190
    assert last.min() < 20


def test_the_next_one_is_made_beforehand_and_any_order_gives_the_same():
    made = []
    ahead = Ahead(lambda number: made.append((number, threading.current_thread().name)) or number * number)
    asked = [0, 1, 2, 7, 8, 2, 2, 3]
    assert [ahead(number) for number in asked] == [number * number for number in asked]
    in_order = {number for number, thread in made if thread != threading.current_thread().name}
    assert in_order >= {1, 2, 8, 3}
    assert {number for number, thread in made if thread == threading.current_thread().name} == {0, 7, 2}


def test_making_goes_on_while_the_last_one_is_used():
    begun = threading.Event()
    ahead = Ahead(lambda number: begun.set() if number == 1 else None)
    ahead(0)
    assert begun.wait(10)


def test_what_goes_wrong_beforehand_is_raised_where_it_is_asked_for():
    def make(number: int) -> int:
        if number == 2:
            raise OSError(5, "the disk is gone")
        return number

    ahead = Ahead(make)
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        ahead(2)


@pytest.mark.parametrize("shift", [1.0, 2.0, 4.0])
def test_a_shift_of_timesteps_moves_their_quartiles(shift):
    config = configuration.load_preset("micro", [f"training.timestep_shift={shift}", "diffusion.timesteps=1000"])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_timestep(config, generator) for _ in range(4000)])
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    expected = [1000 * shift * u / (1 + (shift - 1) * u) for u in (0.25, 0.5, 0.75)]
    assert drawn.double().quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist() == pytest.approx(expected, abs=30)


def test_processes_draw_what_a_thread_draws():
    config = configuration.load_preset("micro")
    clips = open_clips(config)
    ahead = AheadInProcesses(lambda number: draw_batch(config, clips, 4 * number, 4, 3), 2, pin=False)
    for number in (5, 6, 7, 8, 2, 3):
        drawn, expected = ahead(number), draw_batch(config, clips, 4 * number, 4, 3)
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(drawn, name), tensor), (number, name)


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_is_raised_where_it_is_asked_for():
    def make(number: int) -> int:
        if number == 2:
            raise BadInput("the clip is gone", "bring it back")
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    ahead = AheadInProcesses(make, 2, pin=False)
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(BadInput, match=r"^the clip is gone$") as caught:
        ahead(2)
    assert caught.value.hint == "bring it back"
    with pytest.raises(RunFailed, match=r"^a process that draws batches has ended \(DataLoader worker .*\)$"):
        [ahead(number) for number in (6, 7)]


def test_an_error_of_the_program_in_a_process_keeps_its_words():
    def make(number: int) -> int:
        raise RuntimeError(f"no {number}")

    with pytest.raises(RuntimeError, match="no 3"):
        AheadInProcesses(make, 2, pin=False)(3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_the_parents_business_alone(number):
    """As of a Ctrl-C: it would count twice, and stop a training at once; or of torchrun: nothing would be saved."""
    with StopSignals() as stop:
        ahead = AheadInProcesses(lambda _: os.getpid(), 2, pin=False)
        workers = {ahead(number) for number in range(6)}
        for worker in workers:
            subprocess.run(["kill", f"-{number}", str(worker)], check=True)
        time.sleep(0.2)
        assert stop.received is None
        assert {ahead(number) for number in range(6, 12)} == workers


def runs(process: str) -> bool:
    """Whether a process is alive; one that has ended may stay a zombie where nobody asks for it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("end", "exit_code"), [("pass", 0), ("os._exit(3)", 3), ("raise SystemExit(4)", 4), ("os.kill(os.getpid(), 9)", -9)]
)
@pytest.mark.slow
def test_processes_end_with_their_parent(end, exit_code):
    code = f"""
import os
from fdm_cli.training_batches import AheadInProcesses
ahead = AheadInProcesses(lambda _: os.getpid(), 2, pin=False)
print(*(ahead(number) for number in range(4)), flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == exit_code
    deadline = time.monotonic() + 10
    while any(map(runs, done.stdout.split())):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(set(done.stdout.split())) == 2


@pytest.mark.slow
def test_without_shared_memory():
    config = configuration.load_preset("micro")
    batch = draw_batch(config, open_clips(config), 0, 2, 0)
    assert all(tensor.is_shared() for tensor in vars(batch.shared()).values())
    code = """
import resource
from fdm_cli import config
from fdm_cli.dataset import open_clips
from fdm_cli.errors import RunFailed
from fdm_cli.training_batches import draw_batch
config = config.load_preset("micro")
batch = draw_batch(config, open_clips(config), 0, 2, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
try:
    batch.shared()
except RunFailed as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert done.stdout.startswith("no shared memory for a batch: ")
