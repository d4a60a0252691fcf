"""Shared fixtures: a micro checkpoint trained once by the real command, and the command itself."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

from tests import command
from tests.command import ROOT as ROOT

# Of the same examples every time, and without a limit of time: the machine may have other work.
settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")
LONGEST = ("test_compiled.py", "test_train_resume.py", "test_distributed.py", "test_memory.py", "test_resume.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: begun last, they would be waited for by processes that have nothing to do."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def fdm(*arguments: object, cwd: Path | None = None, check: int | None = 0, anew: bool = False, **environment: str):
    """Runs the real command in a process of its own; `check` is the exit code that is expected.

    `anew` starts an interpreter for it, see `tests.command`.
    """
    if anew:
        done = command.anew(*arguments, cwd=cwd, **environment)
    else:
        started = command.Command(*arguments, cwd=cwd, **environment)
        stdout, stderr = started.communicate(timeout=300)
        done = subprocess.CompletedProcess(arguments, started.returncode, stdout, stderr)
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left():
    yield
    command.close()


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
    fdm("train", "--preset", "micro", "--steps", 8, "--run", folder, "--quiet", anew=True)
    return folder


@pytest.fixture(scope="session")
def micro_checkpoint(micro_run) -> Path:
    """Its last checkpoint."""
    return micro_run / "checkpoints" / "step-00000008.pt"


@pytest.fixture(scope="session")
def micro_weights(micro_checkpoint, tmp_path_factory) -> Path:
    """The same without what only training needs: hundreds of commands load it, tensor by tensor."""
    path = tmp_path_factory.mktemp("weights") / micro_checkpoint.name
    fdm("checkpoint", "convert", micro_checkpoint, path, "--quiet")
    return path
