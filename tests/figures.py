"""The README's tables about a model: `python -m tests.figures PART [OPTION ...]`, options as `fdm evaluate` takes them.

samplers   prediction against network calls a window, for each sampler; and the curve docs/samplers.png
schemes    drift, calls, waves and seconds of every shipped scheme
guidance   prediction and drift for several weights
"""

import json
import subprocess
import sys
from pathlib import Path

from fdm_cli import scheme
from fdm_cli.curve_picture import Curve, draw
from fdm_cli.picture import write_png
from tests.bench import FDM

SAMPLERS = {"ancestral": (25, 50, 100, 250, 1000), "ddim": (5, 10, 15, 20, 30), "dpm-solver++": (5, 10, 15, 20, 30)}
COLOURS = {"ancestral": (40, 44, 52), "ddim": (31, 119, 180), "dpm-solver++": (214, 83, 14)}
WEIGHTS = (1, 1.25, 1.5, 2)


def evaluate(*options: object) -> dict:
    """What `fdm evaluate --json` says, with the options of the command line."""
    command = [FDM, "evaluate", "--json", *map(str, options), *sys.argv[2:]]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def row(*cells: object) -> None:
    """A line of a table in Markdown."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*cells: str) -> None:
    """The first lines of one."""
    row(*cells)
    row(*("---:" if number else "---" for number in range(len(cells))))


def samplers() -> None:
    """PSNR against network calls."""
    head("sampler", "calls", "PSNR (dB)", "one ahead", "sharpness")
    curves = []
    for sampler, all_steps in SAMPLERS.items():
        points = []
        for steps in all_steps:
            quality = evaluate("--only", "prediction", "--sampler", sampler, "--steps", steps)["prediction"]["model"]
            psnr, ahead, sharp = quality["psnr_all"], quality["psnr"][0], quality["sharpness_all"]
            row(sampler, steps, f"{psnr:.2f}", f"{ahead:.2f}", f"{sharp:.2f}")
            points.append((min(steps, 50), psnr))
        curves.append(Curve(sampler, points, COLOURS[sampler], dots=True))
    path = Path("docs") / "samplers.png"
    path.parent.mkdir(exist_ok=True)
    write_png(path, draw(curves, "network calls a window (more than 50 stand at 50)", "PSNR", linear=True), force=True)


def schemes() -> None:
    """Drift of long rollouts."""
    names = [name for name in scheme.names() if name != "single"]
    made = evaluate("--only", "drift", *(word for name in names for word in ("--scheme", name)))["drift"]
    statistics = ("ink", "grey", "sharpness", "changed")
    head("scheme", "windows", "waves", "seconds", *(f"{name}, last / real" for name in statistics))
    for name, found in made["schemes"].items():
        ratios = (f"{found[statistic]['ratio']:.2f}" for statistic in statistics)
        row(f"`{name}`", found["calls"], found["waves"], round(found["seconds"]), *ratios)


def guidance() -> None:
    """History guidance."""
    head("weight", "PSNR (dB)", "sharpness", "ink, last / real", "grey, last / real", "seconds")
    for weight in WEIGHTS:
        made = evaluate("--only", "prediction,drift", "--guidance", weight)
        quality, (drift,) = made["prediction"]["model"], made["drift"]["schemes"].values()
        row(weight, f"{quality['psnr_all']:.2f}", f"{quality['sharpness_all']:.2f}", f"{drift['ink']['ratio']:.2f}",
            f"{drift['grey']['ratio']:.2f}", round(drift["seconds"]))  # fmt: skip


PARTS = {"samplers": samplers, "schemes": schemes, "guidance": guidance}

if __name__ == "__main__":
    PARTS[sys.argv[1]]()
