"""Runs that are interrupted in every way, by the real command, and go on bit for bit."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from fdm_cli.checkpoint import read_state, save_state
from fdm_cli.run_folder import RunFolder
from tests.command import ROOT, Command
from tests.conftest import fdm
from tests.networks import SMALLEST_OPTIONS
from tests.runs import assert_same, newest, wait_for

pytestmark = pytest.mark.slow

MICRO = ("train", "--preset", "micro", "--batch-size", 1, "--steps", 30, "--set", "model.dropout=0.1",
         "--set", "training.checkpoint_every=10", "--set", "training.held_out_every=0")  # fmt: skip

TINY = ("train", "--preset", "micro", "--batch-size", 1, *SMALLEST_OPTIONS, "--set", "training.held_out_every=0",
        "--set", "training.preview_every=0")  # fmt: skip


def wait_for_step(process, run, step):
    def reached():
        assert process.poll() is None, process.stderr.read()
        return any(record["step"] >= step for record in RunFolder(run).read_metrics())

    wait_for(reached)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    fdm(*MICRO, "--run", run, "--quiet")
    return run


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_thirty_steps_are_thirteen_and_the_rest(straight, tmp_path, name, code):
    run = tmp_path / "run"
    process = Command(*MICRO, "--run", run)
    wait_for_step(process, run, 13)
    process.send_signal(getattr(signal, name))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    stopped_at = newest(run)["step"]
    if name != "SIGKILL":
        assert f"stopped after step {stopped_at}; saved at step {stopped_at}" in stderr
        assert 13 <= stopped_at < 30
    else:
        assert stopped_at in (10, 20)
    fdm(*MICRO, "--run", run, "--resume", "--quiet")
    assert_same(run, straight)
    assert [record["step"] for record in RunFolder(run).read_metrics()] == list(range(1, 31))


def test_kill_9_at_25_moments(tmp_path):
    run = tmp_path / "run"
    moments = random.Random(0)
    every = ("--set", "training.checkpoint_every=1")
    step = 0
    for _ in range(25):
        resume = ("--resume",) if (run / "config.yaml").exists() else ()
        process = Command(*TINY, *every, "--steps", 100_000, "--run", run, *resume)
        # Of the moments, some are while it starts, most within the first steps and their checkpoints.
        new_steps = moments.randrange(4)
        if new_steps:
            wait_for(lambda: len(list(RunFolder(run).read_metrics())) >= step + new_steps)  # noqa: B023
        time.sleep(moments.uniform(0, 0.3 if new_steps else 2))
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == -9, stderr
        folder = RunFolder(run)
        steps = [record["step"] for record in folder.read_metrics()]
        if folder.checkpoints():
            reached = newest(run)["step"]
            assert reached >= max(step, *(done - 1 for done in steps))
            step = reached
        else:
            assert len(steps) <= 1
    assert step > 10
    last = step + 2
    fdm(*TINY, *every, "--steps", last, "--run", run, "--resume")
    fdm(*TINY, "--steps", last, "--run", tmp_path / "straight", "--set", f"training.checkpoint_every={last}")
    assert_same(run, tmp_path / "straight")
    assert [record["step"] for record in RunFolder(run).read_metrics()] == list(range(1, last + 1))
    assert not list(run.rglob("*.part*"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_stops_at_once(tmp_path, name):
    fdm(*TINY, "--steps", 2, "--run", tmp_path / "start", "--quiet")
    start_from = tmp_path / "start" / "checkpoints" / "step-00000002.pt"
    # A step of 65,536 clips takes minutes; it is cut into parts to fit into memory.
    long_step = ("--batch-size", 65536, "--set", "training.accumulation=64")
    run = tmp_path / "run"
    process = Command(*TINY, *long_step, "--init-from", start_from, "--run", run, "--steps", 3)
    wait_for(lambda: "training" in process.stderr.readline())
    time.sleep(1)
    process.send_signal(getattr(signal, name))
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(getattr(signal, name))
    stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == {"SIGTERM": 143, "SIGINT": 130}[name]
    assert stdout == ""
    assert re.search(r"^error: stopped at once", stderr, re.M)
    assert "Traceback" not in stderr
    assert newest(run)["step"] == 0


def test_a_loss_that_stays_infinite_stops_the_run(tmp_path):
    run = tmp_path / "run"
    fdm(*TINY, "--steps", 4, "--set", "training.checkpoint_every=2", "--run", run, "--quiet")
    good = newest(run)
    poisoned = read_state(run / "checkpoints" / "step-00000004.pt")
    poisoned["model"]["out.2.weight"] = torch.full_like(poisoned["model"]["out.2.weight"], 1e38)
    save_state(run / "checkpoints" / "step-00000004.pt", poisoned)
    done = fdm("train", "--run", run, "--resume", "--steps", 20, check=1)
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error == "error: the loss was not finite in 5 steps in a row, up to step 9"
    assert "step-00000004.pt is no good start" in hint
    records = list(RunFolder(run).read_metrics())
    assert [record["loss"] for record in records[4:]] == [None] * 5
    after = newest(run)
    assert after["step"] == 4
    for key, value in good["ema"].items():
        assert torch.equal(after["ema"][key], value)


def test_a_run_that_diverges_names_the_last_good_checkpoint(tmp_path):
    run = tmp_path / "run"
    wild = ("--precision", "fp16", "--set", "training.learning_rate=1.0", "--set", "training.gradient_clip=1e6")
    done = fdm(*TINY, *wild, "--set", "training.checkpoint_every=1", "--steps", 300, "--run", run, check=1)
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert re.fullmatch(r"error: the loss was not finite in 5 steps in a row, up to step \d+", error)
    state = newest(run)
    assert f"the last good checkpoint is {run}/checkpoints/step-{state['step']:08d}.pt" in hint
    assert all(value.isfinite().all() for value in state["ema"].values())


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    run = tmp_path / "run"
    fdm(*TINY, "--steps", 2, "--run", run, "--quiet")
    size = (run / "checkpoints" / "step-00000002.pt").stat().st_size
    before = newest(run)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    command = [sys.executable, "-m", "fdm_cli", "train", "--run", str(run), "--resume", "--steps", "4"]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=env, preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "no space left to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert newest(run)["step"] == before["step"] == 2
    assert not list(run.rglob("*.part*"))
    fdm("train", "--run", run, "--resume", "--steps", 4)
    assert newest(run)["step"] == 4
