"""The `fdm` command: the app, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import FrameType
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from fdm_cli import __version__
from fdm_cli.cli import checkpoint, evaluate, extend, inspect_scheme, sample, train
from fdm_cli.cli.options import Settings
from fdm_cli.errors import FdmError, is_out_of_memory, one_line

_OF_THE_NAME = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM)  # errors that another name would not have
_LOADED_SLOWLY = ("torch", "numpy")
_TERMINATED = 128 + signal.SIGTERM
WAIT_FOR_WORDS = 10  # seconds

app = typer.Typer(
    name="fdm",
    help="Long videos from a small diffusion model (Flexible Diffusion Modeling, arXiv 2205.11495).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        import torch

        from fdm_cli.device import choose_device

        print(f"fdm {__version__} (torch {torch.__version__}, device {choose_device('auto')})")
        raise typer.Exit


@app.callback()
def fdm(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the versions of fdm and torch and the device.", callback=_print_version),
    ] = False,
) -> None:
    """Long videos from a small diffusion model (Flexible Diffusion Modeling, arXiv 2205.11495)."""


app.command()(train.train)
app.command(short_help="Make a new video of any length.")(sample.sample)
app.command(short_help="Continue a clip of your own, or show what came before.")(extend.extend)
app.command("inspect-scheme", short_help="Show the plan of a sampling scheme.")(inspect_scheme.inspect_scheme)
app.command(short_help="Measure a model on held-out clips.")(evaluate.evaluate)
app.add_typer(checkpoint.app, name="checkpoint")


def main() -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 bad usage or input, 130 or 143 stopped by a signal."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _unraisable
    settings = Settings()
    if sys.stderr is None:  # closed: else the next file that is opened would get what is meant for it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
    if sys.stdout is None:
        _fail("stdout is closed", "results go there; > /dev/null throws them away", 1)
    try:
        code = app(standalone_mode=False, obj=settings, prog_name="fdm")
        _flush()
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(error.exit_code)
        # Processes under torchrun have one command line: one of them says what is wrong with it. The others wait until
        # torchrun ends them, as it ends all at the first exit, which would leave that one no time to say it.
        if _is_silent():
            time.sleep(WAIT_FOR_WORDS)
        message = "" if _is_silent() else error.format_message().rstrip(".")
        _fail(message, _usage_hint(error), error.exit_code)
    except FdmError as error:
        if settings.debug and error.message:
            traceback.print_exc()
        _fail(error.message, error.hint, error.exit_code)
    except BrokenPipeError:
        _leave_quietly()
    except SystemExit as stopped:
        if stopped.code == _TERMINATED:
            _fail("" if _is_silent() else "terminated", None, _TERMINATED)
        raise
    except typer.Abort:
        _fail("interrupted", None, 130)
    except (MemoryError, RuntimeError) as error:
        out_of_memory = is_out_of_memory(error)
        broken = type(error).__name__ == "AcceleratorError"  # an old card that torch is not built for, a driver
        if not out_of_memory and not broken:
            raise
        if settings.debug:
            traceback.print_exc()
        if out_of_memory:
            _fail(f"out of memory: {error}"[:200], "a smaller batch, or --memory-budget, which sees to that", 1)
        _fail(str(error).partition("\n")[0], "--device cpu computes without it", 1)
    except OSError as error:
        if settings.debug:
            traceback.print_exc()
        _fail(_describe_os_error(error), None, 2 if error.errno in _OF_THE_NAME else 1)
    if code == 130:
        _fail("interrupted", None, 130)
    sys.exit(code if isinstance(code, int) else 0)


def _is_silent() -> bool:
    """Whether this is one of the processes under torchrun of which another has the word."""
    return os.environ.get("RANK", "0") != "0"


def _terminate(signal_number: int, _frame: object) -> NoReturn:
    """SIGTERM as an exception, so that `finally` clauses run."""
    raise SystemExit(128 + signal_number)  # _TERMINATED


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """SIGINT as Python has it, but for the seconds in which torch is loaded: its C code drops the exception."""
    specs = (getattr(sys.modules.get(name), "__spec__", None) for name in _LOADED_SLOWLY)
    if any(getattr(spec, "_initializing", False) for spec in specs):
        os.write(2, b"error: interrupted\n")
        os._exit(130)
    signal.default_int_handler(signal_number, frame)


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Where Python drops an exception (a weakref's callback, `__del__`), a signal's comes again a moment later."""
    kinds = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    number = kinds.get(lost.exc_type)
    if number is None:
        sys.__unraisablehook__(lost)
    else:
        # From a thread: here it would be dropped again.
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()


def _flush() -> None:
    """Writes what is still to be written to stdout, if there is one."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, "stdout") from None


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    """Prints the error, if it has words, and exits; stdout may be broken, so nothing more is flushed into it."""
    with suppress(OSError):  # nobody may be reading; the exit code still says it
        if message:
            print(f"error: {one_line(message)}", file=sys.stderr)
        if message and hint:
            print(f"hint: {one_line(hint)}", file=sys.stderr)
        sys.stderr.flush()
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _leave_quietly() -> NoReturn:
    """The reader of stdout went away (`| head`): nothing to say, and nothing left to flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(0)


def _usage_hint(error: TyperException) -> str | None:
    if getattr(error, "option_name", None) == "--steps":
        return "denoising steps are --sampling-steps, new frames a window --step; fdm train has --steps"
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context is not None else None


def _describe_os_error(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
