"""What the README says is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
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
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        ["bash", "-c", snippet("In a CI script")], cwd=work, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (work / "video.gif").stat().st_size > 1000


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
