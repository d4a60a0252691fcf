import json
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, fdm


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    done = fdm("train", "--preset", "micro", "--memory-budget", "100MB", "--json", cwd=tmp_path, check=2)
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: a step of 4 clips needs")
    assert "100 MB (--memory-budget)" in error
    assert hint.startswith("hint: --batch-size 1 fits")
    for remedy in ("training.accumulation=4", "training.activation_checkpointing=true", "training.precision=bf16"):
        assert remedy in hint
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_the_hint_says_is_true(tmp_path):
    common = ("train", "--preset", "micro", "--steps", 1, "--memory-budget", "100MB", "--run", "run")
    done = fdm(*common, "--batch-size", 1, cwd=tmp_path)
    assert "memory: a step needs" in done.stderr
    assert "fits a T4" in done.stderr
    fdm(*common[:-1], "other", "--batch-size", 2, cwd=tmp_path, check=2)


@pytest.mark.slow
def test_not_even_one_clip(tmp_path):
    done = fdm("train", "--preset", "micro", "--memory-budget", "1MB", cwd=tmp_path, check=2)
    assert "hint: not even one clip at a time fits" in done.stderr


@pytest.mark.parametrize(("size", "says"), [("lots", "'lots' is no amount of memory"), ("16", "'16' is no amount")])
def test_a_budget_that_is_none(tmp_path, size, says):
    done = fdm("train", "--preset", "micro", "--memory-budget", size, cwd=tmp_path, check=2)
    assert says in done.stderr
    assert "for example 16GB" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_dry_run(tmp_path):
    common = ("train", "--preset", "micro", "--dry-run", "--memory-budget")
    found = json.loads(fdm(*common, "1GB", "--json", cwd=tmp_path).stdout)["memory"]
    assert found.keys() == {
        "parameters", "gradients", "optimizer", "ema", "activations", "peak", "margin", "budget", "fits",
        "largest_batch", "t4",
    }  # fmt: skip
    assert found["budget"] == 10**9
    assert found["t4"].keys() == {"usable", "fits", "largest_batch"}
    assert (found["fits"], found["t4"]["fits"]) == (True, True)
    # A dry run starts nothing and so refuses nothing.
    text = fdm(*common, "100MB", cwd=tmp_path).stdout
    assert "100 MB (--memory-budget): too large, largest batch 1" in text


@pytest.mark.slow
def test_a_batch_of_512_of_the_large_preset_is_refused_within_a_minute(tmp_path):
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-m', 'fdm_cli', 'train', '--preset', 'moving-mnist', "
        "'--batch-size', '512', '--memory-budget', '16GB'])\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 60
    returncode, used = map(int, done.stdout.split())
    assert returncode == 2
    assert used * 1024 < 1.5e9
    assert "hint: --batch-size 1" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", [("sample",), ("extend", ROOT / "tests/data/one-digit.gif")])
def test_a_network_call_that_does_not_fit_is_refused(micro_weights, tmp_path, command):
    common = (*command, "--checkpoint", micro_weights, "--scheme", "keyframes", "--length", 160)
    done = fdm(*common, "--memory-budget", "100MB", "--max-batch", 16, cwd=tmp_path, check=2)
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: a network call on")
    assert "(--memory-budget)" in error
    largest = int(hint.removeprefix("hint: --max-batch ").removesuffix(" fits"))
    assert 1 <= largest < 16
    assert list(tmp_path.iterdir()) == []
    fitting = (*common, "--memory-budget", "100MB", "--dry-run", "--json", "--max-batch")
    memory = json.loads(fdm(*fitting, largest, cwd=tmp_path).stdout)["memory"]
    assert memory["fits"]
    assert (memory["batch"], memory["largest_batch"], memory["budget"]) == (largest, largest, 10**8)
    assert memory["t4"]["fits"]
    fdm(*fitting, largest + 1, cwd=tmp_path, check=2)
    done = fdm(*common, "--memory-budget", "1MB", cwd=tmp_path, check=2)
    assert "not even one window fits" in done.stderr
    assert list(tmp_path.iterdir()) == []
