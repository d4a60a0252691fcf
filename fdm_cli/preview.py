"""A look at what a model in training makes: a few short videos, always from the same noise."""

from __future__ import annotations

from pathlib import Path

from fdm_cli import plan, rollout, scheme, video
from fdm_cli.batch import Sampling
from fdm_cli.checkpoint import Checkpoint
from fdm_cli.films import Films
from fdm_cli.video_info import DEFAULT_FPS

SAMPLES = 4
SCHEME = "autoregressive"
SAMPLER = "dpm-solver++"
SEED = 0
WINDOWS = 3  # the longest preview, in windows


def write_preview(checkpoint: Checkpoint, path: Path, at_once: int) -> None:
    """Samples SAMPLES videos, WINDOWS windows long or less where training clips are, and writes them as a grid.

    Args:
        checkpoint: the model, on its device.
        path: of the GIF; a contact sheet goes beside it as PNG.
        at_once: windows in one network call.

    Raises:
        RunFailed: they cannot be written; or the model makes frames that are not numbers.
    """
    config = checkpoint.config
    length = min(config.data.clip_length, WINDOWS * config.model.window)
    path.parent.mkdir(exist_ok=True)
    side = config.model.image_size
    films = Films(
        [path],
        DEFAULT_FPS,
        shape=(length, side, side),
        samples=SAMPLES,
        grid=True,
        sheets=[path.with_suffix(".png")],
    )
    the_plan = plan.make(scheme.load(SCHEME), length=length, window=min(config.model.window, length))
    sampling = Sampling.of(SAMPLER, None, guidance=1.0, timesteps=config.diffusion.timesteps)
    with films:
        for update in rollout.run(checkpoint, the_plan, sampling, seed=SEED, samples=SAMPLES, max_batch=at_once):
            for frames in update.frames:
                films.write(video.to_uint8(frames))
