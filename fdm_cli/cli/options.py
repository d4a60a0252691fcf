"""Options that several commands share, spelt once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fdm_cli
from fdm_cli.cli.render import Output
from fdm_cli.errors import BadInput
from fdm_cli.files import refuse_taken
from fdm_cli.plan import MAX_LENGTH
from fdm_cli.scheme import MAX_WINDOW

if TYPE_CHECKING:
    from fdm_cli.batch import Sampling

BUNDLED_MODEL = Path(fdm_cli.__file__).parent / "assets" / "moving-mnist-small.safetensors"
BUNDLED_SHIFT = 1.75  # what a model gains by a shift depends on how good it is


@dataclass
class Settings:
    """What the error boundary has to know of the command line, set while it is parsed."""

    debug: bool = False


class DeviceName(StrEnum):
    """Where tensors live; `auto` takes CUDA, else the CPU."""

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
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks on stderr, only warnings.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug, is_eager=True)
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, max=1024, help="CPU threads; default: what torch chooses."),
]
Device = Annotated[DeviceName, typer.Option("--device", help="Where to compute.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Seed; drawn and printed when not given."),
]
TrainingSeed = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Seed; default: the configuration's.")
]


def model_file(option: Path | None, output: Output) -> Path:
    """The checkpoint that `--checkpoint` names, or the bundled one, which is then said. Raises BadInput."""
    if option is not None:
        return option
    if not BUNDLED_MODEL.is_file():
        raise BadInput(
            f"no model: {BUNDLED_MODEL} is missing from this installation",
            "--checkpoint FILE names another; fdm train --preset micro makes a small one in a few minutes",
        )
    output.note(f"no --checkpoint: the bundled {BUNDLED_MODEL.stem}, digits of 32 x 32 pixels")
    return BUNDLED_MODEL


def _is_bundled(checkpoint: Path | None) -> bool:
    """Whether it is the bundled model, named or not."""
    return checkpoint is None or checkpoint.absolute() == BUNDLED_MODEL.absolute()


def spacing(option: float | None, checkpoint: Path | None, sampler: str) -> float:
    """What `--timestep-shift` says; else even spacing, or what suits the bundled model by the default sampler."""
    if option is not None:
        return option
    return BUNDLED_SHIFT if _is_bundled(checkpoint) and sampler == DEFAULT_SAMPLER else 1.0


def departures(sampling: Sampling) -> str:
    """How sampling departs from even timesteps and the plain model, to be said after the sampler's name."""
    shifted = f", timestep shift {sampling.shift:g}" if sampling.shift != 1 else ""
    guided = f", guidance {sampling.guidance:g}" if sampling.guidance != 1 else ""
    rescaled = f" rescaled by {sampling.rescale:g}" if sampling.rescale else ""
    return shifted + guided + rescaled


def checkpoint_path(text: str) -> Path:
    """A checkpoint file; of a run's folder its newest."""
    path = Path(text)
    if os.path.isdir(path / "checkpoints"):  # noqa: PTH112  (Path.is_dir raises for a name that is too long)
        from fdm_cli.run_folder import RunFolder

        return next(reversed(RunFolder(path).checkpoints()), path)
    return path


def folder_path(text: str) -> Path:
    """A folder. Raises BadInput for "", which an empty variable of a script leads to: not the current folder, then."""
    if not text:
        raise BadInput("--run: the name is empty", "--run . is the current folder")
    return Path(text)


def clip_path(text: str) -> Path:
    """A clip of the user's. Raises BadInput for "": all images of the current folder are a clip, too."""
    if not text:
        raise BadInput("the name of a clip is empty", "`.` is the images of the current folder")
    return Path(text)


def output_path(text: str) -> Path:
    """What `--output` names. Raises BadInput for `name.gif/`: of a path nobody sees any more how it was typed."""
    if text == "-":
        raise BadInput("--output: a video is not written to stdout", "name a file, or ./- for a folder of that name")
    path = Path(text)
    if text.endswith(("/", os.sep)) and path.suffix:
        raise BadInput(f"--output: {text}: a folder of PNG images has a name without a dot", f"{path.stem}/")
    if path.name in ("", "..") or (path.name.startswith(".") and not path.suffix) or path.name.endswith("."):
        raise BadInput(f"--output: {text!r} is no name of a video", "for example video.gif, or frames/ for images")
    return path


def check_plot(path: Path, force: bool) -> None:
    """Raises BadInput unless `--plot` names a PNG file that may be written."""
    if path.suffix.lower() != ".png":
        raise BadInput(f"--plot: {path} does not end in .png")
    refuse_taken(path, force)


Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        parser=checkpoint_path,
        help="The model, or a run's folder: its newest; default: the bundled one.",
    ),
]
Scheme = Annotated[
    str, typer.Option("--scheme", metavar="NAME|FILE", help="Sampling scheme; `fdm inspect-scheme` lists them.")
]
Length = Annotated[
    int | None,
    typer.Option(
        "--length",
        metavar="N",
        min=1,
        max=MAX_LENGTH,
        help="Frames of the whole video; default: the scheme's.",
    ),
]
ExtendLength = Annotated[
    int | None,
    typer.Option(
        "--length",
        metavar="N",
        min=1,
        max=MAX_LENGTH,
        help="Frames of the whole video; default: the scheme's or twice the given ones; interpolate: four times.",
    ),
]
Window = Annotated[
    int | None,
    typer.Option("--window", metavar="N", min=1, max=MAX_WINDOW, help="Frames a window; default: the model's."),
]
Step = Annotated[
    int | None,
    typer.Option(
        "--step", metavar="N", min=1, max=MAX_WINDOW, help="New frames a window; default: the scheme's share."
    ),
]
Begin = Annotated[
    int | None,
    typer.Option(
        "--begin",
        metavar="N",
        min=1,
        max=MAX_WINDOW,
        help="Frames that a video from nothing begins with, as many again following until a window is full; "
        "default: a whole window.",
    ),
]
NumSamples = Annotated[
    int, typer.Option("--num-samples", metavar="N", min=1, max=10_000, help="Videos to make, a numbered file each.")
]
DEFAULT_SAMPLER = "dpm-solver++"  # README.md has the curve that chose it, and its number of steps
Sampler = Annotated[str, typer.Option("--sampler", metavar="NAME", help="dpm-solver++, ddim or ancestral.")]
SamplingSteps = Annotated[
    int | None,
    typer.Option(
        "--sampling-steps",
        metavar="N",
        min=1,
        max=100_000,
        help="Denoising steps a window; default: dpm-solver++ 15, ddim 25, ancestral 250.",
    ),
]
Eta = Annotated[
    float,
    typer.Option("--eta", metavar="E", min=0.0, max=1.0, help="Of ddim: 0 adds no noise, 1 as much as ancestral."),
]
TimestepShift = Annotated[
    float | None,
    typer.Option(
        "--timestep-shift",
        metavar="K",
        min=0.1,
        max=10.0,
        help="Spacing of the steps: above 1 more where there is much noise; default: 1, even; "
        f"{BUNDLED_SHIFT:g} with the bundled model and {DEFAULT_SAMPLER}.",
    ),
]
Guidance = Annotated[
    float,
    typer.Option(
        "--guidance",
        metavar="W",
        min=0.0,
        max=20.0,
        help="Weight of observed frames: 1 is the plain model, more follows them more closely.",
    ),
]
GuidanceRescale = Annotated[
    float,
    typer.Option(
        "--guidance-rescale",
        metavar="PHI",
        min=0.0,
        max=1.0,
        help="How far a guided frame gets the contrast back that it has without guidance.",
    ),
]
MaxBatch = Annotated[
    int | None,
    typer.Option(
        "--max-batch",
        metavar="N",
        min=1,
        max=65_536,
        help="Windows in one network call; default: up to 16, on a GPU 64.",
    ),
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        parser=output_path,
        help="Where the video goes: .gif, .mp4, .npz and more, or a folder; default: a new GIF.",
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(
        "--fps", metavar="N", min=0.01, max=1000.0, help="Frames a second; default: the clip's, 10 where there is none."
    ),
]
Scale = Annotated[
    int, typer.Option("--scale", metavar="N", min=1, max=64, help="Pixels a pixel becomes in each direction.")
]
Grid = Annotated[bool, typer.Option("--grid", help="All samples in one video, side by side.")]
Embedding = Annotated[
    str, typer.Option("--embedding", metavar="NAME", help="How adaptive schemes compare frames: pixels or lpips.")
]
UseLast = Annotated[
    int | None,
    typer.Option("--use-last", metavar="N", min=1, max=MAX_LENGTH, help="Take only the clip's last N frames."),
]
Until = Annotated[
    Path | None,
    typer.Option(
        "--until", metavar="FILE", parser=clip_path, help="Clip that the result ends with; the scheme is then bridge."
    ),
]
ExtendScheme = Annotated[
    str | None,
    typer.Option(
        "--scheme", metavar="NAME|FILE", help="Sampling scheme; default: autoregressive, or bridge with --until."
    ),
]
Sheet = Annotated[bool, typer.Option("--sheet", help="Also a contact sheet, a PNG beside the video.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="torch.compile the network: minutes first, then perhaps faster calls."),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option("--memory-budget", metavar="SIZE", help="Memory to fit into, as 16GB; default: what is free."),
]
ResumeSampling = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run of the same options.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and stop.")]
