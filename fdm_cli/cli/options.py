"""Options that several commands share, spelt once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

MAX_FRAMES = 100_000_000
MAX_WINDOW = 4096


@dataclass
class Settings:
    """What the error boundary has to know of the command line, set while it is parsed."""

    debug: bool = False


class DeviceName(StrEnum):
    """Where tensors live; `auto` takes CUDA, then MPS, then the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


def _remember_debug(context: typer.Context, value: bool) -> bool:
    settings = context.find_object(Settings)
    if settings is not None and value:
        settings.debug = True
    return value


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks on stderr.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug, is_eager=True)
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads; default: what torch chooses.")
]
Device = Annotated[DeviceName, typer.Option("--device", help="Where to compute.")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed; drawn and printed when not given.")
]
