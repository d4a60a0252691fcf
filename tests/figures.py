"""The README's tables and pictures about a model: `python -m tests.figures PART [OPTION ...]`.

Options are those of `fdm evaluate`, or of `fdm sample` where nothing but pictures is made.

samplers   prediction against network calls a window, for each sampler (docs/samplers.png)
schemes    drift, windows, waves, network calls and seconds of every shipped scheme
guidance   prediction and drift for several weights and rescalings
weights    every tenth frame of a video with each of them (docs/guidance.png)
pictures   every tenth frame of a video by each scheme (docs/schemes.png)
seeds      every tenth frame of eight videos by `autoregressive` and by `keyframes`, to look at (docs/*.png)
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fdm_cli import montage, scheme
from fdm_cli.curve_picture import Curve, draw
from fdm_cli.evaluate import STATISTICS
from fdm_cli.picture import write_png
from tests.bench import FDM

FEW, ALL = 30, 1000  # network calls: the most that are drawn as a curve, and all timesteps
SAMPLERS = {
    "dpm-solver++": (5, 10, 12, 15, 20, 30),
    "ddim": (5, 10, 15, 20, 25, 30),
    "ancestral": (10, 20, 30, 100, ALL),
}
GREY = (130, 130, 130)
COLOURS = {"ancestral": (40, 44, 52), "ddim": (31, 119, 180), "dpm-solver++": (214, 83, 14)}
GUIDANCE = ((1, 0), (1.25, 0), (1.5, 0), (1.5, 0.75), (2, 0), (2, 0.75))  # weight and rescaling
DOCS = Path("docs")
CLIP = "tests/data/two-digits.gif"
GIVEN = {"ends": 8, "last": 8, "spread": 16}  # its frames, where a scheme needs some
LENGTH, EVERY, SCALE, LABEL, GAP = 160, 10, 2, 190, 4  # frames, frames; then pixels


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
    """PSNR and sharpness against network calls, beside ancestral sampling with all steps."""
    rows = [(name, steps) for name, all_steps in SAMPLERS.items() for steps in all_steps]
    found = dict(zip(rows, side_by_side(rows, sampled), strict=True))
    head("sampler", "calls", "PSNR (dB)", "one ahead", "sharpness")
    for (name, steps), quality in found.items():
        psnr, ahead, sharp = quality["psnr_all"], quality["psnr"][0], quality["sharpness_all"]
        row(name, steps, f"{psnr:.2f}", f"{ahead:.2f}", f"{sharp:.2f}")
    pictures = []
    for words, key in (("PSNR (dB)", "psnr_all"), ("sharpness / true", "sharpness_all")):
        curves = []
        for name, all_steps in SAMPLERS.items():
            points = [(steps, found[name, steps][key]) for steps in all_steps if steps <= FEW]
            curves.append(Curve(name, points, COLOURS[name], dots=True))
        reference = found["ancestral", ALL][key]
        curves.append(Curve(f"ancestral, {ALL} calls", [(5, reference), (FEW, reference)], GREY))
        pictures.append(draw(curves, "network calls a window", words, linear=True))
    write_png(DOCS / "samplers.png", np.concatenate(pictures, axis=1), force=True)


def sampled(row: tuple[str, int]) -> dict:
    """The quality of a sampler's predictions with so many steps."""
    name, steps = row
    options = ("--sampler", name, "--sampling-steps", steps, "--threads", 1)
    quality = evaluate("--only", "prediction", *options)["prediction"]["model"]
    print(name, steps, quality["psnr_all"], quality["psnr"][0], quality["sharpness_all"], file=sys.stderr, flush=True)
    return quality


def side_by_side(things: Sequence, work: Callable) -> list:
    """Work on each thing, one a processor core, the last ones first: they take the longest."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, reversed(things)))[::-1]


def schemes() -> None:
    """Drift of long rollouts."""
    names = [name for name in scheme.names() if name != "single"]
    made = evaluate("--only", "drift", *(word for name in names for word in ("--scheme", name)))["drift"]
    head("scheme", "windows", "waves", "network calls", "seconds", *(f"{name}, last / real" for name in STATISTICS))
    for name, found in made["schemes"].items():
        ratios = (f"{found[statistic]['ratio']:.2f}" for statistic in STATISTICS)
        row(f"`{name}`", found["calls"], found["waves"], found["network_calls"], round(found["seconds"]), *ratios)


def guidance() -> None:
    """History guidance."""
    head("weight", "rescaled by", "PSNR (dB)", "sharpness", "ink, last / real", "grey, last / real")
    for (weight, rescale), made in zip(GUIDANCE, side_by_side(GUIDANCE, guided), strict=True):
        quality, (drift,) = made["prediction"]["model"], made["drift"]["schemes"].values()
        row(weight, rescale, f"{quality['psnr_all']:.2f}", f"{quality['sharpness_all']:.2f}",
            f"{drift['ink']['ratio']:.2f}", f"{drift['grey']['ratio']:.2f}")  # fmt: skip


def guided(row: tuple[float, float]) -> dict:
    """Prediction and drift with a weight and a rescaling."""
    weight, rescale = row
    options = ("--guidance", weight, "--guidance-rescale", rescale, "--threads", 1)
    return evaluate("--only", "prediction,drift", *options)


def weights() -> None:
    """One seed with every weight and rescaling."""
    rows = {
        f"{weight} rescaled by {rescale}": videos("sample", "--guidance", weight, "--guidance-rescale", rescale)[0]
        for weight, rescale in GUIDANCE
    }
    sheet(DOCS / "guidance.png", rows)


def videos(*command: object) -> list[np.ndarray]:
    """What `fdm sample` or `fdm extend` makes, (N, H, W, 1) each."""
    with tempfile.TemporaryDirectory() as folder:
        common = ("--length", LENGTH, "--seed", 1, "--output", Path(folder) / "video.npz")
        subprocess.run([str(word) for word in (FDM, *command, *common, *sys.argv[2:])], check=True)
        return [np.load(path)["frames"] for path in sorted(Path(folder).glob("*.npz"))]


def sheet(path: Path, rows: dict[str, np.ndarray]) -> None:
    """A row for each video: its name, then every tenth frame."""
    strips = []
    for name, video in rows.items():
        label = Image.new("L", (LABEL, video.shape[1] * SCALE), 255)
        font = ImageFont.load_default(15)
        ImageDraw.Draw(label).text((4, label.height / 2), name, 0, font, anchor="lm")
        shown = (montage.enlarge(frame, SCALE) for frame in video[EVERY - 1 :: EVERY])
        frames = [np.pad(frame, ((0, 0), (GAP, 0), (0, 0)), constant_values=255) for frame in shown]
        row = np.concatenate([np.asarray(label)[..., None], *frames], axis=1)
        strips.append(np.pad(row, ((0, GAP), (0, 0), (0, 0)), constant_values=255))
    write_png(path, np.concatenate(strips), force=True)


def pictures() -> None:
    """Every scheme; those that need given frames get some of a real clip."""
    rows = {}
    for name in scheme.names():
        loaded = scheme.load(name)
        if name == "single":
            continue
        if loaded.start is not None:
            command = ("sample", "--scheme", name)
        else:
            until = ("--until", CLIP) if loaded.given == "ends" else ()
            command = ("extend", CLIP, "--scheme", name, "--use-last", GIVEN[loaded.given], *until)
        rows[name] = videos(*command)[0]
    sheet(DOCS / "schemes.png", rows)


def seeds() -> None:
    """Eight videos."""
    for name in ("autoregressive", "keyframes"):
        made = videos("sample", "--scheme", name, "--num-samples", 8)
        sheet(DOCS / f"{name}.png", {f"{name} {number}": video for number, video in enumerate(made, 1)})


PARTS = {part.__name__: part for part in (samplers, schemes, guidance, weights, pictures, seeds)}

if __name__ == "__main__":
    if not PARTS.keys() & sys.argv[1:2]:
        sys.exit(__doc__)
    PARTS[sys.argv[1]]()
