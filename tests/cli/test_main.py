"""The error boundary, start-up, streams."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fdm_cli.cli import render
from fdm_cli.cli.render import Output
from fdm_cli.errors import MOST_SHOWN, is_out_of_memory, one_line
from tests.command import environment
from tests.conftest import ROOT, fdm


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: now[0])
    with Output().progress(100, "windows", done=10) as progress:
        for second in range(40):
            now[0] = float(second)
            progress.update(10 + second, "loss 0.5", part=(3, 15))
        now[0] = 60.0
        progress.skip(70)
        progress.update(70)
    assert capsys.readouterr().err.splitlines() == [
        "25/100 windows  loss 0.5  step 3/15  1 windows/s  75 s left",
        "40/100 windows  loss 0.5  step 3/15  1 windows/s  60 s left",
        "70/100 windows  0 windows/s  unknown time left",
    ]


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


@pytest.mark.slow
def test_version_names_torch_and_the_device():
    done = fdm("--version", anew=True)
    assert done.stdout.startswith("fdm ")
    assert "torch 2." in done.stdout
    assert "device " in done.stdout


def test_an_unknown_command():
    done = fdm("smaple", check=2)
    assert done.stderr.splitlines()[0].startswith("error: No such command 'smaple'")


def test_steps_of_what():
    assert fdm("sample", "--steps", 5, check=2).stderr.splitlines()[1].startswith("hint: denoising steps are --samp")


def test_names_out_of_files_are_shown_in_one_line(capsys):
    assert one_line("a\x1b[2J\n b\u202e") == "a\\x1b[2J b\\u202e"
    Output(quiet=True).warn("left out \x1b[31mred\x1b[0m.gif: broken\nand this")
    assert capsys.readouterr().err == "warning: left out \\x1b[31mred\\x1b[0m.gif: broken\nand this\n"
    long = one_line("x" * 50_000)
    assert len(long) < MOST_SHOWN
    assert long.endswith("xxx")


def test_debug_shows_the_traceback():
    assert "Traceback" in fdm("sample", "--checkpoint", "missing.pt", "--debug", check=2).stderr
    assert "Traceback" not in fdm("sample", "--checkpoint", "missing.pt", check=2).stderr


def test_memory_that_is_not_there_is_known_by_its_error():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    for words in ("CUDA error: out of memory", "MPS backend out of memory (", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_closed_pipe_ends_quietly():
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    command = f"{sys.executable} -m fdm_cli inspect-scheme autoregressive --length 100000 --json | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=env, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered(shell):
    done = fdm(_FDM_COMPLETE=f"source_{shell}")
    assert "fdm" in done.stdout


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C"}, {"COLUMNS": "30"}, {"FORCE_COLOR": "1"}, {"GITHUB_ACTIONS": "true"}]
)
@pytest.mark.slow
def test_poor_environments(environment):
    """What they show is plain text."""
    for arguments, says in (
        (("inspect-scheme", "autoregressive", "--length", 160), "19 windows"),
        (("sample", "--help"), "Usage: fdm sample"),
    ):
        done = fdm(*arguments, anew=True, **environment)
        assert says in done.stdout
        assert "\x1b" not in done.stdout + done.stderr
    refused = fdm("inspect-scheme", "autoregresive", anew=True, check=2, **environment)
    assert refused.stderr.startswith("error: ")
    assert "\x1b" not in refused.stderr


@pytest.mark.parametrize("module", ["config", "scheme", "plan", "given", "errors"])
def test_what_needs_no_torch_imports_none(module):
    code = (
        f"import sys, fdm_cli.{module}\n"
        "print([m for m in ('torch', 'imageio', 'numpy', 'PIL', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_arguments_the_help_as_it_is():
    done = fdm(check=2)
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: fdm [OPTIONS] COMMAND")
    assert "inspect-scheme  Show" in done.stderr


@pytest.mark.parametrize("seconds", [0, 0.1, 0.3, 0.7])
def test_an_interruption_while_torch_is_loaded(seconds):
    """Its own code drops exceptions meanwhile."""
    command = [sys.executable, "-m", "fdm_cli", "--version"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 or (process.returncode, stderr) == (130, "error: interrupted\n")
    assert process.returncode == 130 or seconds > 0.2  # done by then


@pytest.mark.parametrize("name", ["", "x" * 300, f"{'x' * 300}/y"])
@pytest.mark.parametrize(
    "command",
    [["extend"], ["sample", "--scheme"], ["sample", "--checkpoint"], ["train", "--run"], ["train", "--data"],
     ["inspect-scheme", "loop", "--plot"]],
)  # fmt: skip
@pytest.mark.slow
def test_names_that_no_file_has(command, name, tmp_path):
    done = fdm(*command, name, cwd=tmp_path, check=2)
    assert [line.partition(":")[0] for line in done.stderr.splitlines()].count("error") == 1


def test_a_terminal_that_goes_away_during_progress_ends_nothing(monkeypatch):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Output().progress(3, "steps") as progress:
            progress.update(1)
            os.close(ours)
            progress.update(2)


@pytest.mark.parametrize(("name", "drawn"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_a_terminal_on_which_no_bar_can_be_drawn_gets_lines(monkeypatch, name, drawn):
    monkeypatch.setenv("TERM", name)
    monkeypatch.setattr(render, "PLAIN_INTERVAL", 0)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Output().progress(3, "steps") as progress:
            progress.update(1)
            progress.update(2)
        shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert ("\x1b[" in shown) == drawn
    assert ("2/3 steps" in shown) == (not drawn)
    assert "\\u" not in shown


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_whose_exception_python_drops_comes_again(name):
    script = f"""
import os, signal, sys, time
from fdm_cli.cli import main
signal.signal(signal.SIGTERM, main._terminate)
signal.signal(signal.SIGINT, main._interrupt)
sys.unraisablehook = main._unraisable
class Leaving:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(1)
Leaving()
time.sleep(20)
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == {"SIGINT": -signal.SIGINT, "SIGTERM": 143}[name]
    assert done.stdout == ""
    assert "ignored" not in done.stderr


def test_closed_and_full_stdout():
    closed = subprocess.run(f"{sys.executable} -m fdm_cli inspect-scheme single >&-", shell=True, cwd=ROOT,
                            capture_output=True, text=True, check=False)  # fmt: skip
    assert (closed.returncode, closed.stderr.splitlines()[0]) == (1, "error: stdout is closed")
    full = subprocess.run(f"{sys.executable} -m fdm_cli inspect-scheme single > /dev/full", shell=True, cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (full.returncode, full.stderr) == (1, "error: stdout: No space left on device\n")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
@pytest.mark.slow
def test_remarks_that_nobody_gets_end_nothing(tmp_path, redirection):
    command = (
        f"{sys.executable} -m fdm_cli train --preset micro --steps 1 --run {tmp_path / 'run'} --json {redirection}"
    )
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["step"] == 1


def test_a_result_that_is_no_text_is_escaped(tmp_path):
    shipped = (ROOT / "schemes" / "autoregressive.yaml").read_text()
    (tmp_path / "s.yaml").write_text(shipped.replace("name: autoregressive", "name: größe"))
    done = fdm("inspect-scheme", "s.yaml", "--summary", cwd=tmp_path, anew=True, PYTHONIOENCODING="ascii")
    assert done.stdout.startswith("gr\\xf6\\xdfe: ")
