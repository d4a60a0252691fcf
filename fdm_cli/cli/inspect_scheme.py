"""`fdm inspect-scheme`: what a scheme will do, before a model is loaded."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from fdm_cli import given as givens
from fdm_cli import plan as planner
from fdm_cli import scheme as schemes
from fdm_cli.cli import timeline
from fdm_cli.cli.options import Begin, Debug, Force, Json, Quiet, check_plot, checkpoint_path
from fdm_cli.cli.plan_report import as_data, describe, warn_of_begin, warn_of_blind, warn_of_reach, warn_of_window
from fdm_cli.cli.render import Output
from fdm_cli.errors import BadInput
from fdm_cli.plan import MAX_LENGTH, Plan
from fdm_cli.scheme import MAX_WINDOW


def inspect_scheme(
    name: Annotated[
        str | None, typer.Argument(metavar="[SCHEME]", help="A shipped scheme or a YAML file; without one, a list.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", metavar="N", min=1, max=MAX_LENGTH, help="Frames of the whole video, given ones too."),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", metavar="N", min=1, max=MAX_WINDOW, help="Frames a window.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", min=1, max=MAX_WINDOW, help="New frames a window.")
    ] = None,
    begin: Begin = None,
    given: Annotated[
        str | None,
        typer.Option("--given", metavar="FRAMES", help="Frames that exist: 8 (the first 8), or 0:8,152:160, or ::10."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            metavar="FILE",
            parser=checkpoint_path,
            help="Plan for this model: its window, its training clips.",
        ),
    ] = None,
    summary: Annotated[bool, typer.Option("--summary", help="No picture, and no stages in the JSON.")] = False,
    as_json: Json = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also write the picture as a PNG file.")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    _debug: Debug = False,
) -> None:
    """Show which frames each window of a scheme generates and which it looks at.

    Needs no model; --checkpoint says whether the scheme reaches further than a model has seen.
    The same plan is what sample and extend execute.
    """
    output = Output(as_json, quiet)
    if name is None:
        if any(value is not None for value in (length, window, step, begin, given, checkpoint, plot)) or summary:
            raise BadInput("which scheme?", "known: " + ", ".join(schemes.names()))
        _list_schemes(output)
        return
    if plot is not None:
        check_plot(plot, force)
    clip_length = None
    scheme = schemes.load(name)  # once: it may be a pipe; and what is wrong with it is said before torch is loaded
    if checkpoint is not None:
        from fdm_cli.checkpoint import load_checkpoint

        model = load_checkpoint(checkpoint)
        window, clip_length = window or model.config.model.window, model.clip_length
    plan = _make(scheme, length, window, step, begin, given, output)
    warn_of_blind(plan, output)
    warn_of_begin(plan, begin, output)
    if checkpoint is not None:
        warn_of_window(plan, model.config.model.window, output)
        warn_of_reach(plan, model.clip_length, output)
    if plot is not None:
        from fdm_cli.picture import write_png
        from fdm_cli.plan_picture import draw

        write_png(plot, draw(plan), force=force)
        output.note(f"wrote {plot}")
    if as_json:
        trained = {} if clip_length is None else {"clip_length": clip_length}
        output.result({**as_data(plan, with_stages=not summary), **trained}, "")
    else:
        words = describe(plan, clip_length)
        output.result({}, words if summary else f"{picture(plan)}\n\n{words}")


def picture(plan: Plan) -> str:
    """The timeline, as wide as the terminal, in the characters that it can show."""
    columns = max(20, shutil.get_terminal_size((80, 24)).columns)
    return timeline.timeline(plan, columns, timeline.UNICODE if _shows_unicode() else timeline.ASCII)


def _make(
    scheme: schemes.Scheme,
    length: int | None,
    window: int | None,
    step: int | None,
    begin: int | None,
    given: str | None,
    output: Output,
) -> Plan:
    frames = scheme.length if length is None else length
    if given is None:
        spans = givens.example(scheme, length=length, window=window, step=step)
        if spans:
            output.note(f"{scheme.name} needs given frames; shown with --given {givens.as_typed(spans)}")
    else:
        spans = givens.parse(given, frames)
    return planner.make(scheme, length=length, window=window, step=step, begin=begin, given=spans)


def _list_schemes(output: Output) -> None:
    found = [schemes.load(name) for name in schemes.names()]
    width = max(len(scheme.name) for scheme in found)
    data = {
        "schemes": [
            {
                "name": scheme.name,
                "about": scheme.about,
                "length": scheme.length,
                "window": scheme.window,
                "step": scheme.step,
                "given": scheme.given,
                "needs_given": scheme.start is None,
            }
            for scheme in found
        ]
    }
    output.result(data, "\n".join(f"{scheme.name:<{width}}  {scheme.about}" for scheme in found))


def _shows_unicode() -> bool:
    if os.environ.get("LC_ALL") in ("C", "POSIX"):
        return False
    try:
        "█▒░·…".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
