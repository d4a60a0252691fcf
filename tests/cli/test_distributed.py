"""Training by several processes that the real torchrun starts; they talk over the loopback interface."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fdm_cli.distributed import Ranks
from fdm_cli.errors import BadInput
from fdm_cli.run_folder import RunFolder
from tests.conftest import ROOT, fdm
from tests.networks import SMALLEST_OPTIONS
from tests.runs import newest, wait_for

pytestmark = pytest.mark.slow

MICRO = ("train", "--preset", "micro", "--set", "training.preview_every=0")
TINY = (*MICRO, *SMALLEST_OPTIONS)


def torchrun(processes, *arguments, cwd=None, script=("-m", "fdm_cli")):
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d",
               "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}",
               *script, *map(str, arguments)]  # fmt: skip
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHON=sys.executable)
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr
    return stdout, stderr


def errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def assert_close(run, other):
    mine, others = newest(run), newest(other)
    assert mine["step"] == others["step"]
    for part in ("model", "ema"):
        for key, value in mine[part].items():
            assert (value - others[part][key]).abs().max() <= 1e-5, key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    fdm(*MICRO, "--steps", 12, "--set", "training.held_out_every=6", "--run", run, "--quiet")
    return run


def test_two_processes_give_the_weights_of_one(alone, tmp_path):
    run = tmp_path / "run"
    accumulate = ("--set", "training.accumulation=2")
    stdout, stderr = finish(
        torchrun(2, *MICRO, "--steps", 12, "--set", "training.held_out_every=6", *accumulate, "--run-dir", run)
    )
    assert stdout.strip() == str(run / "checkpoints" / "step-00000012.pt")
    assert stderr.count("training 0.47 M parameters on cpu, fp32, batch 4 in 2 parts over 2 processes") == 1
    assert_close(run, alone)
    for mine, other in zip(RunFolder(run).read_metrics(), RunFolder(alone).read_metrics(), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
        assert mine.get("held_out_quartiles", []) == pytest.approx(other.get("held_out_quartiles", []), rel=1e-3)


def test_another_number_of_processes_goes_on(alone, tmp_path):
    run = tmp_path / "run"
    every = ("--set", "training.held_out_every=6")
    fdm(*MICRO, *every, "--steps", 5, "--run", run)
    finish(torchrun(2, "train", "--run-dir", run, "--resume", "--steps", 9))
    fdm("train", "--run", run, "--resume", "--steps", 12)
    assert_close(run, alone)


@pytest.mark.parametrize("to", ["one process", "torchrun", "all"])
def test_a_signal_to_any_stops_all_after_the_step(tmp_path, to):
    run = tmp_path / "run"
    process = torchrun(2, *TINY, "--steps", 100_000, "--run-dir", run)
    wait_for(lambda: process.poll() is not None or len(list(RunFolder(run).read_metrics())) >= 3)
    assert process.poll() is None, process.stderr.read()
    # A service that is stopped has its processes signalled, and torchrun passes on its own to them.
    members = [_child(process.pid, rank) for rank in (0, 1)]
    for pid in {"one process": members[1:], "torchrun": [process.pid], "all": [*members, process.pid]}[to]:
        os.kill(pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert stdout == ""
    (error,) = errors(stderr)
    step = newest(run)["step"]
    assert error == f"error: stopped after step {step}; saved at step {step}"
    assert [record["step"] for record in RunFolder(run).read_metrics()] == list(range(1, step + 1))


def _child(parent, rank):
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            its_parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if its_parent == parent and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("no such process")


def test_an_error_of_one_process_ends_all_with_one_message(tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 8, 1), np.uint8)
    for rank, content in enumerate((clips, clips[:, :2])):
        (tmp_path / str(rank)).mkdir()
        np.save(tmp_path / str(rank) / "clips.npy", content)
    # Each process works in a folder of its own, and finds other data there.
    (tmp_path / "start.sh").write_text('cd "$RANK" && exec "$PYTHON" -m fdm_cli "$@"')
    began = time.monotonic()
    process = torchrun(
        2, *TINY, "--data", "clips.npy", "--run-dir", tmp_path / "run",
        cwd=tmp_path, script=("--no-python", "sh", tmp_path / "start.sh"),
    )  # fmt: skip
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    (error,) = errors(stderr)
    assert "clips" in error
    assert "data.clip_length" in stderr
    assert time.monotonic() - began < 100
    assert not (tmp_path / "run").exists() or not RunFolder(tmp_path / "run").checkpoints()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--batch-size", 3), "training.batch_size 3 cannot be shared out evenly over 2 processes"),
        (("--stpes", 3), "No such option: --stpes"),
        (("--set", "training.stpes=3"), "unknown key 'stpes'"),
    ],
)
def test_bad_usage_is_said_once(tmp_path, arguments, says):
    _, stderr = finish(torchrun(2, *MICRO, *arguments, "--run-dir", tmp_path / "run"), 1)  # torchrun's own exit code
    (error,) = errors(stderr)
    assert says in error
    assert "exitcode  : 2" in stderr
    assert not (tmp_path / "run").exists()


UNLIKE = """
import json
import os
from fdm_cli import budget
from fdm_cli.cli.main import main

budget.available = lambda device: budget.Budget((150, 90)[int(os.environ["RANK"])] * 10**6, "test")
main()
"""


def test_processes_with_unlike_memory_share_out_the_same_batches(micro_weights, tmp_path):
    script = tmp_path / "unlike.py"
    script.write_text(UNLIKE)
    options = ("--scheme", "single", "--length", 16, "--num-samples", 24, "--grid", "--sampling-steps", 1, "--json")
    sample = ("sample", "--checkpoint", micro_weights, *options, "--seed", 1, "--output", tmp_path / "video.npz")
    stdout, _ = finish(torchrun(2, *sample, script=(script,)))
    report = json.loads(stdout)
    assert 1 <= report["max_batch"] < 12
    assert report["network_calls"] == -(-24 // report["max_batch"])


def test_processes_do_not_share_a_mac_s_gpu():
    with pytest.raises(BadInput, match="cannot share the work on mps"):
        Ranks(0, 2).device(torch.device("mps"))


def test_evaluate_is_one_process(tmp_path):
    _, stderr = finish(torchrun(2, "evaluate", "--clips", 2, cwd=tmp_path), 1)
    assert errors(stderr) == ["error: fdm evaluate is one process, torchrun started 2"]


@pytest.mark.parametrize(
    ("environment", "says"),
    [({"WORLD_SIZE": "2"}, "MASTER_ADDR"), ({"WORLD_SIZE": "two", "MASTER_ADDR": "127.0.0.1"}, "two")],
)
def test_half_of_what_torchrun_says_is_bad_usage(tmp_path, environment, says):
    done = fdm("train", "--preset", "micro", "--run", "run", cwd=tmp_path, check=2, RANK="0", **environment)
    assert done.stderr.startswith("error: several processes cannot meet: ")
    assert says in done.stderr.splitlines()[0]
    assert done.stderr.splitlines()[1] == "hint: start them with torchrun, or unset RANK"


def test_a_video_made_together_can_be_stopped_and_gone_on_with(micro_weights, tmp_path):
    command = ("sample", "--checkpoint", micro_weights, "--scheme", "keyframes", "--length", 160, "--num-samples", 2,
               "--grid", "--max-batch", 2, "--sampling-steps", 4, "--seed", 1)  # fmt: skip
    fdm(*command, "--output", "alone.npz", "-q", cwd=tmp_path)
    finish(torchrun(2, *command, "--output", "whole.npz", cwd=tmp_path))
    alone, whole = (np.load(tmp_path / f"{name}.npz")["frames"].astype(int) for name in ("alone", "whole"))
    assert abs(alone - whole).max() <= 1  # of one process, up to rounding
    process = torchrun(2, *command, "--output", "video.npz", cwd=tmp_path)
    journal = tmp_path / ".video.npz.work" / "journal.jsonl"
    wait_for(lambda: process.poll() is not None or (journal.exists() and journal.read_bytes().count(b"\n") >= 2))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    (error,) = errors(stderr)
    assert error.startswith("error: interrupted; ")
    assert not (tmp_path / "video.npz").exists()
    finish(torchrun(2, *command, "--output", "video.npz", "--resume", cwd=tmp_path))
    assert (tmp_path / "video.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
