"""What the README says is true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fdm_cli import given, scheme
from fdm_cli import plan as planning
from fdm_cli.config import load_preset
from tests.conftest import ROOT, fdm
from tests.readme import README, snippet, with_current_help


@pytest.mark.slow
def test_help_texts_are_the_real_ones():
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- help: ") >= 4
    assert with_current_help(text) == text, "run: python -m tests.readme"


@pytest.mark.slow
def test_the_snippet_for_ci_runs_as_it_stands(tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, arguments in {"fdm": "-m fdm_cli", "python": ""}.items():
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (bin_folder / name).chmod(0o755)
    env = dict(os.environ, PATH=f"{bin_folder}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        ["bash", "-c", snippet("In a CI script")],
        cwd=tmp_path,
        env=dict(env, TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert next(tmp_path.glob("*/video.gif")).stat().st_size > 1000


def test_the_lines_of_python_run_as_they_stand(micro_checkpoint):
    lines = snippet("From Python", "python").replace("runs/micro/checkpoints/step-00001000.pt", str(micro_checkpoint))
    names = {}
    exec(lines, names)
    assert names["estimate"].shape == (1, 16, 1, 16, 16)


def test_numbers_of_frames_that_are_named():
    text = " ".join(README.read_text(encoding="utf-8").split())
    reaches = {
        "autoregressive": 16,
        "prepend": 16,
        "long-range": 148,
        "loop": 151,
        "hierarchy-2": 160,
        "keyframes": 160,
    }
    for name, frames in reaches.items():
        one = scheme.load(name)
        plan = planning.make(one, length=160, window=16, given=given.example(one, length=160, window=16))
        assert plan.reach + 1 == frames, name
        assert f"`{name}`" in text
    assert "clips of 16 frames do for `autoregressive` and `prepend`" in text
    assert "148 for `long-range`; 151 for `loop`" in text
    data = load_preset("moving-mnist-small").data
    assert [data.spanned(step) for step in (10_000, 20_000, 30_000, 40_000)] == [31, 54, 93, 160]
    assert "to 31 frames at step 10,000, 54 at 20,000, 93 at 30,000 and 160 at 40,000" in text


@pytest.mark.slow
def test_json_objects_hold_what_the_table_says(micro_checkpoint, tmp_path):
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    named = {row: re.findall(r"`(\w+)`", keys) for row, keys in rows}
    sampled, clip = (named.pop(row) for row in ("`sample`, `extend`", "`extend` also, but for `--dry-run`"))
    few = ("--checkpoint", micro_checkpoint, "--length", 20, "--sampling-steps", 1)

    def keys(*arguments):
        return set(json.loads(fdm(*arguments, "--json", "--quiet", cwd=tmp_path).stdout))

    assert keys("sample", *few, "-o", "v.gif") == set(sampled)
    assert keys("extend", "v.gif", *few[:2], "--length", 24, "--sampling-steps", 1, "-o", "w.gif") == {*sampled, *clip}
    beside = set(json.loads((tmp_path / "v.gif.json").read_text()))
    assert beside == {*sampled, "stages"} - {"outputs", "sheets"}
    assert {*keys("sample", *few, "--dry-run"), "closed"} == set(named["`sample`, `extend` with `--dry-run`"])
    assert keys("extend", "v.gif", *few, "--length", 24, "--dry-run") == keys("sample", *few, "--dry-run")
    plan = keys("inspect-scheme", "autoregressive", *few[:4])
    of_stages = {"wave", "observed", "observed_count", "latent"}
    assert {*plan, *of_stages, "closed"} == set(named["`inspect-scheme NAME`"])
    assert keys("train", "--preset", "micro", "--steps", 1, "--run", "run") == set(named["`train`"])
    assert keys("train", "--preset", "micro", "--dry-run") == set(named["`train --dry-run`"])
    bound = ("--only", "bound", "--bound-timesteps", 2, "--clips", 1)
    assert keys("evaluate", *few[:2], *bound) == set(named["`evaluate`"])
    for name, arguments in (("info", ()), ("convert", ("c.pt",))):
        done = fdm("checkpoint", name, micro_checkpoint, *arguments, "--json", cwd=tmp_path)
        assert set(json.loads(done.stdout)) == set(named[f"`checkpoint {name}`"])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "schemes/README.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name} links to {target}"


def test_every_verb_of_the_makefile_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in ("README.md", "CONTRIBUTING.md"):
        for verb in re.findall(r"`make (\w+)`", Path(ROOT / page).read_text(encoding="utf-8")):
            assert f"\n{verb}:" in makefile
