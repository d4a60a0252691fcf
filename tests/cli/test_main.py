"""The error boundary, start-up, streams."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, fdm


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sample", "--help"], ["extend", "--help"]])
def test_help_imports_neither_torch_nor_imageio(arguments):
    code = (
        "import sys, atexit\n"
        "heavy = ('torch', 'imageio', 'numpy', 'PIL', 'av')\n"
        "atexit.register(lambda: print('loaded:', [m for m in heavy if m in sys.modules], file=sys.stderr))\n"
        f"sys.argv = ['fdm', *{arguments!r}]\n"
        "from fdm_cli.cli.main import main\n"
        "main()\n"
    )
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "Usage: fdm" in done.stdout
    assert "loaded: []" in done.stderr


def test_version_names_torch_and_the_device():
    done = fdm("--version")
    assert done.stdout.startswith("fdm ")
    assert "torch 2." in done.stdout
    assert "device " in done.stdout


def test_no_command_shows_the_help_and_is_bad_usage():
    done = fdm(check=2)
    assert "Usage: fdm" in done.stdout + done.stderr


def test_an_unknown_command():
    done = fdm("smaple", check=2)
    assert done.stderr.splitlines()[0].startswith("error: No such command 'smaple'")


def test_debug_shows_the_traceback():
    assert "Traceback" in fdm("sample", "--debug", check=2).stderr
    assert "Traceback" not in fdm("sample", check=2).stderr


def test_a_closed_pipe_ends_quietly():
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    command = f"{sys.executable} -m fdm_cli inspect-scheme autoregressive --length 100000 --json | head -c 10"
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_full_stdout_is_an_error():
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    command = f"{sys.executable} -m fdm_cli inspect-scheme autoregressive --json > /dev/full"
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered(shell):
    done = fdm(_FDM_COMPLETE=f"source_{shell}")
    assert "fdm" in done.stdout


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"COLUMNS": "30"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_poor_environments(environment):
    done = fdm("inspect-scheme", "autoregressive", "--length", 160, **environment)
    assert "\x1b" not in done.stdout
    assert "19 calls" in done.stdout
