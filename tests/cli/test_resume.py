"""`sample` and `extend` that are stopped, for real, and go on."""

import json
import random
import signal
import time

import numpy as np
import pytest

from tests.command import Command
from tests.conftest import fdm

pytestmark = pytest.mark.slow


def stop(process, folder, signal_number, rounds=1, delay=0.0):
    """Signals the process some time after it has finished so many rounds; its exit code (0 when it was faster)."""
    journal = folder / "journal.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= rounds:
            time.sleep(delay)
            process.send_signal(signal_number)
            break
        time.sleep(0.005)
    process.wait(timeout=120)
    return process.returncode


def content(path):
    if path.is_dir():
        return {entry.name: entry.read_bytes() for entry in path.iterdir()}
    return path.read_bytes()


@pytest.mark.parametrize(
    ("signal_number", "options"),
    [
        (signal.SIGTERM, ("--scheme", "autoregressive", "--num-samples", 2)),
        (signal.SIGKILL, ("--scheme", "keyframes", "--max-batch", 2)),
        (signal.SIGKILL, ("--scheme", "adaptive-hierarchy-2", "--sampler", "ancestral")),
    ],
)
def test_stopped_at_random_moments_it_gives_the_same_bytes(micro_weights, tmp_path, signal_number, options):
    common = ("--checkpoint", micro_weights, "--length", 120, "--sampling-steps", 3, *options)
    fdm("sample", *common, "--seed", 5, "-o", "whole.npz", "-q", cwd=tmp_path)
    command = ("sample", *common, "-o", "video.npz")
    chance = random.Random(f"{signal_number} {options}")
    work = tmp_path / ".video.npz.work"
    first = Command(*command, "--seed", 5, cwd=tmp_path)
    code = stop(first, work, signal_number, chance.randrange(1, 4), delay=chance.random() / 50)
    assert code in (143, -signal.SIGKILL)
    for _ in range(2):
        if code:
            assert code in (143, -signal.SIGKILL)
            rounds = (work / "journal.jsonl").read_bytes().count(b"\n")
            assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("video")) == []
            code = stop(
                Command(*command, "--resume", cwd=tmp_path), work, signal_number, rounds + 1, delay=chance.random() / 50
            )
    if code:
        fdm(*command, "--resume", "-q", cwd=tmp_path)
    for whole in tmp_path.glob("whole*.npz"):
        assert whole.with_name(whole.name.replace("whole", "video")).read_bytes() == whole.read_bytes()
        made, expected = (
            json.loads(whole.with_name(f"{whole.name.replace('whole', name)}.json").read_text())
            for name in ("video", "whole")
        )
        for name in ("output", "seconds"):
            del made[name], expected[name]
        assert made == expected
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["video.gif", "video.mp4", "video"])
def test_any_format_is_written_anew_from_what_was_kept(micro_weights, tmp_path, name):
    common = ("--checkpoint", micro_weights, "--length", 90, "--sampling-steps", 3, "--seed", 5)
    whole = f"whole{name.removeprefix('video')}"
    fdm("sample", *common, "-o", whole, "-q", cwd=tmp_path)
    command = ("sample", *common, "-o", name)
    work = tmp_path / f".{name}.work"
    assert stop(Command(*command, cwd=tmp_path), work, signal.SIGKILL, rounds=3) == -signal.SIGKILL
    assert not (tmp_path / name).exists()
    assert all(entry.name.startswith((".", "whole")) for entry in tmp_path.iterdir())
    fdm(*command, "--resume", "-q", cwd=tmp_path)
    assert content(tmp_path / name) == content(tmp_path / whole)
    assert not list(tmp_path.glob(".*"))


def test_extend_goes_on_too_but_not_with_another_clip(micro_weights, tmp_path):
    generator = np.random.default_rng(0)
    for clip in ("clip", "other"):
        np.savez(tmp_path / f"{clip}.npz", frames=generator.integers(0, 256, (8, 16, 16, 1), np.uint8), fps=12.5)
    common = ("--checkpoint", micro_weights, "--length", 90, "--sampling-steps", 3, "--seed", 5)
    fdm("extend", "clip.npz", *common, "-o", "whole.npz", "-q", cwd=tmp_path)
    process = Command("extend", "clip.npz", *common, "-o", "video.npz", cwd=tmp_path)
    assert stop(process, tmp_path / ".video.npz.work", signal.SIGINT, rounds=2) == 130
    done = fdm("extend", "other.npz", *common, "-o", "video.npz", "--resume", cwd=tmp_path, check=2)
    assert "was begun with input sha256" in done.stderr
    fdm("extend", "clip.npz", *common, "-o", "video.npz", "--resume", "-q", cwd=tmp_path)
    assert (tmp_path / "video.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_what_an_interrupted_run_says_and_what_may_follow(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 120, "--guidance", 2, "--sampling-steps", 4)
    process = Command(*common, "--sheet", cwd=tmp_path)
    work = tmp_path / ".sample-autoregressive-1.gif.work"
    assert stop(process, work, signal.SIGTERM, rounds=2) == 143
    *_, error, hint = process.stderr.read().splitlines()
    assert error.startswith("error: interrupted; ")
    assert error.endswith(" of 14 windows are kept in .sample-autoregressive-1.gif.work")
    assert hint == "hint: the same command with --resume goes on"
    seed = json.loads((work / "run.json").read_text())["seed"]
    done = fdm(*common, "--output", "sample-autoregressive-1.gif", cwd=tmp_path, check=2)
    assert "an interrupted run is kept in .sample-autoregressive-1.gif.work" in done.stderr
    assert "--resume goes on with it, --force starts over" in done.stderr
    for other, says in [
        (("--seed", seed + 1), f"seed {seed}, this is {seed + 1}"),
        (("--sampler", "ancestral"), "sampler dpm-solver++, this is ancestral"),
        (("--max-batch", 3), "max batch 16, this is 3"),
        (("--guidance", 1), "guidance 2.0, this is 1.0"),
        (("--guidance-rescale", 0.5), "guidance rescale 0.0, this is 0.5"),
        (("--step", 4), "step 8, this is 4"),
        (("--begin", 2), "begin none, this is 2"),
        (("--scheme", "hierarchy-2", "--output", "sample-autoregressive-1.gif"), "scheme autoregressive, this is"),
    ]:
        done = fdm(*common, "--resume", *other, cwd=tmp_path, check=2)
        assert f"was begun with {says}" in done.stderr
    # Another run of the same name is not mistaken for it, and does not disturb it.
    assert fdm(*common[:-2], "--sampling-steps", 1, cwd=tmp_path).stdout.strip() == "sample-autoregressive-2.gif"
    # Going on takes the seed and the chosen name from what was kept.
    planned = json.loads(fdm(*common, "--sheet", "--resume", "--dry-run", "--json", cwd=tmp_path).stdout)
    assert (planned["outputs"], planned["seed"]) == (["sample-autoregressive-1.gif"], seed)
    result = json.loads(fdm(*common, "--sheet", "--resume", "--json", cwd=tmp_path).stdout)
    assert (result["output"], result["seed"]) == ("sample-autoregressive-1.gif", seed)
    assert not work.exists()
    assert (tmp_path / "sample-autoregressive-1.gif.sheet.png").exists()


def test_force_starts_over_and_a_resumed_run_remembers_it(micro_weights, tmp_path):
    (tmp_path / "video.npz").write_bytes(b"old")
    common = ("sample", "--checkpoint", micro_weights, "--length", 60, "--sampling-steps", 3, "-o", "video.npz")
    work = tmp_path / ".video.npz.work"
    assert stop(Command(*common, "--force", "--seed", 1, cwd=tmp_path), work, signal.SIGKILL) == -signal.SIGKILL
    assert (tmp_path / "video.npz").read_bytes() == b"old"
    (work / "journal.jsonl").unlink()  # so that what `stop` waits for is the second run's
    assert stop(Command(*common, "--force", "--seed", 2, cwd=tmp_path), work, signal.SIGKILL) == -signal.SIGKILL
    result = json.loads(fdm(*common, "--resume", "--json", cwd=tmp_path).stdout)
    assert result["seed"] == 2
    assert (tmp_path / "video.npz").read_bytes() != b"old"


def test_two_at_once(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 400, "--sampling-steps", 4, "-o", "video.npz")
    first = Command(*common, cwd=tmp_path)
    while not (tmp_path / ".video.npz.work" / "run.json").exists():
        assert first.poll() is None
        time.sleep(0.02)
    done = fdm(*common, "--force", cwd=tmp_path, check=2)
    assert "another process is at work here" in done.stderr
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 143


def test_resume_without_an_interrupted_run_starts_one(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 16, "--sampling-steps", 1, "-o", "video.npz")
    done = fdm(*common, "--resume", cwd=tmp_path)
    assert "no run was interrupted here: starting one" in done.stderr
    assert "exists already" in fdm(*common, "--resume", cwd=tmp_path, check=2).stderr


def test_going_on_replaces_only_what_was_the_run_s(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 60, "--sampling-steps", 3, "-o", "v.npz")
    (tmp_path / "v.npz").write_text("mine")
    two = (*common, "--num-samples", 2)
    assert stop(Command(*two, "--force", cwd=tmp_path), tmp_path / ".v.npz.work", signal.SIGKILL) == -signal.SIGKILL
    done = fdm(*two, "--resume", "--grid", cwd=tmp_path, check=2)
    assert "v.npz: exists already" in done.stderr
    assert (tmp_path / "v.npz").read_text() == "mine"
    fdm(*two, "--resume", cwd=tmp_path)
    assert (tmp_path / "v-2.npz").exists()


def test_a_run_s_folder_that_has_a_newer_checkpoint(micro_weights, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-00000001.pt").write_bytes(micro_weights.read_bytes())
    common = ("sample", "--checkpoint", "run", "--length", 60, "--sampling-steps", 3, "-o", "v.npz")
    work = tmp_path / ".v.npz.work"
    assert stop(Command(*common, cwd=tmp_path), work, signal.SIGTERM) == 143
    fdm("checkpoint", "convert", "--half", micro_weights, checkpoints / "step-00000002.pt")
    done = fdm(*common, "--resume", cwd=tmp_path, check=2)
    assert "it was begun with --checkpoint run/checkpoints/step-00000001.pt" in done.stderr
    fdm(*common[:2], checkpoints / "step-00000001.pt", *common[3:], "--resume", cwd=tmp_path)


def test_a_name_as_long_as_file_systems_allow(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 20, "--sampling-steps", 1)
    longest = "動" * 78
    fdm(*common, "-o", f"{longest}.gif", "--sheet", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{longest}.gif{ending}" for ending in ("", ".json", ".sheet.png")
    ]
    assert "longer than 240 bytes" in fdm(*common, "-o", f"{longest}動.gif", cwd=tmp_path, check=2).stderr


def test_a_chosen_name_that_is_long_is_found_again(micro_weights, tmp_path):
    clip = tmp_path / f"{'動' * 60}.gif"
    fdm("sample", "--checkpoint", micro_weights, "--length", 20, "--sampling-steps", 1, "-o", clip, "-q")
    command = ("extend", clip, "--checkpoint", micro_weights, "--length", 120, "--sampling-steps", 3)
    process = Command(*command, cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob(".*.work/journal.jsonl")):
        time.sleep(0.005)
    (work,) = tmp_path.glob(".*.work")
    assert stop(process, work, signal.SIGTERM) == 143
    done = fdm(*command, "--resume", cwd=tmp_path)
    assert "starting one" not in done.stderr
    assert not work.exists()
