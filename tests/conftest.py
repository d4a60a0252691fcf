"""Shared fixtures: a micro checkpoint trained once by the real command, and the command itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def fdm(*arguments: object, cwd: Path | None = None, check: int | None = 0, **environment: str):
    """Runs the real command in a process of its own; `check` is the exit code that is expected."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment}
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS"):
        env.pop(name, None)
    command = [sys.executable, "-m", "fdm_cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory):
    """Decoded videos of tests do not go to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory) -> Path:
    """A run folder of `micro`, trained for a few steps."""
    folder = tmp_path_factory.mktemp("micro") / "run"
    fdm("train", "--preset", "micro", "--steps", 8, "--run", folder, "--quiet")
    return folder


@pytest.fixture(scope="session")
def micro_checkpoint(micro_run) -> Path:
    """Its last checkpoint."""
    return micro_run / "checkpoints" / "step-00000008.pt"
