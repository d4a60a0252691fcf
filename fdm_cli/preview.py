"""A look at what a model in training makes: a few short videos, always from the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdm_cli import picture, plan, rollout, scheme, video
from fdm_cli.batch import Sampling
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.video_info import DEFAULT_FPS, Frame
from fdm_cli.video_writer import open_writer

SAMPLES = 4
SCHEME = "autoregressive"
SAMPLER = "dpm-solver++"
SEED = 0
WINDOWS = 3  # the longest preview, in windows
SHEET_COLUMNS = 16


def write_preview(checkpoint: Checkpoint, path: Path, at_once: int = SAMPLES) -> None:
    """Samples SAMPLES videos, WINDOWS windows long or less where training clips are, and writes them side by side.

    Args:
        checkpoint: the model, on its device.
        path: of the GIF; a contact sheet, one video a row, goes beside it as PNG.
        at_once: windows in one network call.

    Raises:
        RunFailed: they cannot be written; or the model makes frames that are not numbers.
    """
    config = checkpoint.config
    length = min(config.data.clip_length, WINDOWS * config.model.window)
    path.parent.mkdir(exist_ok=True)
    shown = picture.spread(length, SHEET_COLUMNS)
    rows: list[list[Frame]] = [[] for _ in range(SAMPLES)]
    the_plan = plan.make(scheme.load(SCHEME), length=length, window=min(config.model.window, length))
    number = 0
    with open_writer(path, DEFAULT_FPS, force=True) as writer:
        sampling = Sampling.of(SAMPLER, None, guidance=1.0, timesteps=config.diffusion.timesteps)
        for update in rollout.run(checkpoint, the_plan, sampling, seed=SEED, samples=SAMPLES, max_batch=at_once):
            for frames in update.frames:
                pixels = video.to_uint8(frames)
                writer.write(np.concatenate(list(pixels), axis=1))
                if number in shown:
                    for row, frame in zip(rows, pixels, strict=True):
                        row.append(frame)
                number += 1
    labels = [str(frame) for frame in shown]
    sheet = picture.contact_sheet([frame for row in rows for frame in row], labels=labels * SAMPLES, columns=len(shown))
    picture.write_png(path.with_suffix(".png"), sheet, force=True)
