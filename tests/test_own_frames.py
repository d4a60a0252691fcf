"""Training on windows that observe what the network has drawn, by the real command where one is needed."""

import signal

import numpy as np
import pytest
import torch

from fdm_cli import config as configuration
from fdm_cli import video
from fdm_cli.checkpoint import load_checkpoint
from fdm_cli.dataset import open_clips
from fdm_cli.errors import BadInput
from fdm_cli.own_frames import CLIPS_A_FILE, OwnFrames
from fdm_cli.run_folder import RunFolder
from fdm_cli.training_batches import draw_batch
from tests.clips import moving_square, write_container
from tests.command import Command
from tests.conftest import fdm
from tests.networks import SMALLEST_OPTIONS
from tests.runs import assert_same, wait_for

TINY = ("train", "--preset", "micro", "--batch-size", 16, *SMALLEST_OPTIONS, "--set", "training.held_out_every=0",
        "--set", "training.preview_every=0", "--quiet")  # fmt: skip
OWN = ("--set", "training.own_share=0.5", "--set", f"training.own_clips={CLIPS_A_FILE + 3}")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    run = tmp_path_factory.mktemp("start") / "run"
    fdm(*TINY, "--steps", 2, "--run", run)
    return run


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    fdm(*TINY, *OWN, "--init-from", start, "--steps", 5, "--run", run)
    return run


def own_of(run):
    config = configuration.load(run / "config.yaml")
    return OwnFrames(RunFolder(run).own, config, open_clips(config)), config


def test_observed_frames_are_the_networks_own_and_latent_ones_true(straight):
    own, config = own_of(straight)
    assert [path.name for path in own.files] == ["00000.npy", "00001.npy"]
    made = np.concatenate([np.load(path) for path in own.files])
    assert made.shape == (2 * CLIPS_A_FILE, own.length, 8, 8, 1)
    everything = np.arange(own.length + config.model.window)
    true = np.stack([own._true(number, everything) for number in range(len(made))])
    assert np.array_equal(made[:, : own.given], true[:, : own.given])
    later = slice(own.given, own.length)
    assert np.abs(made[:, later].astype(int) - true[:, later]).mean() > 10  # hardly trained
    kinds = set()
    for number in range(200):
        window, frames = own.draw(torch.Generator().manual_seed(number), config.model.window)
        indices, observed, latent = (tensor.numpy() for tensor in vars(window).values())
        assert latent.any()
        assert (indices >= 0).all()
        of_clip = [
            clip
            for clip in range(CLIPS_A_FILE + 3)
            if np.array_equal(frames[observed], made[clip, indices[observed]])
            and np.array_equal(frames[latent], true[clip, indices[latent]])
        ]
        assert of_clip
        kinds.add(("continued" if (np.diff(indices) == 1).all() else "spread", int(observed.sum())))
    assert {observed for kind, observed in kinds if kind == "continued"} >= set(range(1, config.model.window))
    assert any(kind == "spread" for kind, _ in kinds)


@pytest.mark.slow
def test_the_weights_to_start_from_make_them_whatever_is_made_at_once(straight, start, tmp_path):
    own, config = own_of(straight)
    again = OwnFrames(tmp_path / "own", config, own.clips)
    assert list(again.make(load_checkpoint(RunFolder(start).checkpoints()[-1]), at_once=7))[-1] == 2 * CLIPS_A_FILE
    for mine, others in zip(again.files, own.files, strict=True):
        assert np.abs(np.load(mine).astype(int) - np.load(others)).max() <= 1


def test_only_so_many_windows_are_of_them(straight):
    own, config = own_of(straight)
    plain = draw_batch(config, own.clips, 0, 8, 0)
    for share in (0.25, 1.0):
        config = configuration.load(straight / "config.yaml", [f"training.own_share={share}"])
        batch = draw_batch(config, own.clips, 0, 200, 0, own)
        drawn = np.concatenate(own._made)[:, own.given :]
        known = {video.to_model(frame[None]).numpy().tobytes() for clip in drawn for frame in clip}
        assert plain.x_0.shape[1:] == batch.x_0.shape[1:]
        of_own = [
            any(frame[None].numpy().tobytes() in known for frame in clip[observed])
            for clip, observed in zip(batch.x_0, batch.observed, strict=True)
        ]
        assert share - 0.35 < sum(of_own) / 200 <= share + 0.1


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_bit_for_bit(straight, start, tmp_path):
    run = tmp_path / "run"
    fdm(*TINY, *OWN, "--init-from", start, "--steps", 3, "--run", run)
    fdm("train", "--run", run, "--resume", "--steps", 5, "--quiet")
    assert_same(run, straight)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_finished_files_are_kept_when_it_is_stopped_while_they_are_made(start, tmp_path, name, code):
    run = tmp_path / "run"
    many = (*OWN, "--set", "training.own_clips=8000")
    process = Command(*TINY, *many, "--init-from", start, "--steps", 5, "--run", run)
    first = RunFolder(run).own / "00000.npy"
    wait_for(first.exists)
    written = first.stat().st_mtime_ns
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    if name != "SIGKILL":
        assert "of 8000; what is finished is kept" in stderr
        assert stderr.endswith(f"hint: fdm train --run {run} --resume\n")
    process = Command("train", "--run", run, "--resume")
    wait_for((RunFolder(run).own / "00002.npy").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert first.stat().st_mtime_ns == written
    assert not list(run.rglob("*.part*"))


def test_what_cannot_be_is_refused(straight, start, tmp_path):
    done = fdm(*TINY, *OWN, "--steps", 2, "--run", tmp_path / "a", check=2)
    assert "frames that random weights draw" in done.stderr
    write_container(tmp_path / "short.mp4", moving_square(17, 16, 16))
    arguments = (*TINY, *OWN, "--init-from", start, "--steps", 3, "--data", tmp_path / "short.mp4")
    done = fdm(*arguments, "--set", "data.clip_length=6", "--run", tmp_path / "b", check=2)
    assert "training.own_share takes clips of 18 frames; the longest has 17" in done.stderr
    assert not (tmp_path / "b").exists()
    done = fdm(*TINY, *OWN, "--init-from", start, "--set", "data.clip_length=1", "--run", tmp_path / "c", check=2)
    assert "training.own_share: windows of one frame observe nothing" in done.stderr
    own, config = own_of(straight)
    with pytest.raises(BadInput, match="cannot be read"):
        OwnFrames(tmp_path / "none", config, own.clips).draw(torch.Generator(), 2)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["removed", "cut"])
def test_frames_that_are_gone_are_not_made_by_weights_that_have_learnt(start, tmp_path, spoil):
    run = tmp_path / "run"
    fdm(*TINY, *OWN, "--init-from", start, "--steps", 3, "--run", run)
    second = RunFolder(run).own / "00001.npy"
    if spoil == "removed":
        second.unlink()
    else:
        second.write_bytes(second.read_bytes()[:1000])
    done = fdm("train", "--run", run, "--resume", "--steps", 5, check=2)
    assert str(second) in done.stderr
    assert "Traceback" not in done.stderr
