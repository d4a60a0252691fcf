"""What `fdm train` says of its data: decoding with progress, what was found, a contact sheet of training windows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from fdm_cli.cli.render import Output, plural
from fdm_cli.files import expanded

if TYPE_CHECKING:
    from torch import Tensor

    from fdm_cli.config import Config, DiffusionConfig
    from fdm_cli.dataset import Survey

SHEET_CLIPS = 8  # rows of the sheet
SHEET_FRAMES = 32  # the most columns
MOST_COUNTS = 6  # kinds, sizes and rates that are named


def prepare(config: Config, output: Output) -> Survey:
    """Decodes the data unless that has been done, and returns what there is."""
    from fdm_cli import dataset

    steps = dataset.decode(config)
    first = next(steps, None)
    if first is not None and first.waiting:
        output.note(f"waiting for another process that decodes {config.data.source}")
        first = next(steps, None)
    if first is not None:
        output.note(f"decoding {config.data.source}")
        with output.progress(max(1, first.total), "files") as progress:
            for step in steps:
                progress.update(step.done, f"{step.frames} frames")
    return dataset.survey(config)


def name_left_out(found: Survey, config: Config, output: Output) -> None:
    """A line on stderr for each file that cannot be read, and one for those that are too short."""
    for skipped in found.skipped:
        output.warn(f"left out {skipped.message}")
    if found.short:
        output.note(_short(found, config))


def warn_of_pixels(found: Survey, config: Config, output: Output) -> None:
    """Says when the configuration is made for other pixels than the clips have: those of digits are mostly black."""
    from fdm_cli.dataset import open_clips
    from fdm_cli.training_batches import draw_batch

    if found.unit == "digits":
        return
    pixels = draw_batch(config, open_clips(config), 0, SHEET_CLIPS, config.training.seed).x_0
    process = config.diffusion
    if figures := unlike(pixels, process):
        mean, std = figures
        output.warn(
            f"the pixels of these clips have mean {mean:.2f} and deviation {std:.2f}, the configuration is for "
            f"{process.data_mean:g} and {process.data_std:g}: --set diffusion.data_mean={mean:.2f} "
            f"--set diffusion.data_std={max(std, 0.01):.2f} lets the network learn sooner"
        )


def unlike(pixels: Tensor, process: DiffusionConfig) -> tuple[float, float] | None:
    """Mean and deviation of pixels, where they are far from those that the process is made for."""
    mean = round(float(pixels.mean()), 2) + 0.0  # which makes -0.0 a 0
    std = float(pixels.std())
    near = abs(mean - process.data_mean) < process.data_std and 0.25 < std / process.data_std < 2
    return None if near or std == 0 else (mean, std)


def about(found: Survey) -> str:
    """How much data there is, in a few words."""
    if found.unit == "digits":
        return f"{found.training + found.held_out} digits"
    return f"{plural(len(found.videos), 'clip')}, {plural(found.frames, 'frame')}"


def lines(found: Survey, config: Config, sheet: Path | None) -> list[str]:
    """What was found and what was left out, for a person."""
    split = f"{found.training} for training, {found.held_out} held out"
    if len(found.videos) == 1:
        split = "the same for training and held out"
    result = [f"data: {found.source}: {about(found)}; {split}"]
    if found.unit == "clips":
        size, colour = config.model.image_size, "grey" if config.model.image_channels == 1 else "colour"
        result += [
            f"kinds: {_counts(found.kinds())}",
            f"sizes: {_counts(found.sizes())}; the model gets {size}x{size}, {colour}",
            f"frames a second: {_counts(found.rates())}",
            *(f"left out {skipped.message}" for skipped in found.skipped),
            *([_short(found, config)] if found.short else []),
            *([f"{plural(found.ignored, 'other file')} in the folder"] if found.ignored else []),
            f"decoded into {found.cache}",
        ]
    if sheet is not None:
        result.append(f"{sheet}: training windows; observed frames orange, latent ones blue and dashed, padding bare")
    return result


def _short(found: Survey, config: Config) -> str:
    names = ", ".join(f"{entry.name} ({entry.frames})" for entry in found.short[:5])
    more = f" and {len(found.short) - 5} more" if len(found.short) > 5 else ""
    return f"left out {len(found.short)} shorter than data.clip_length {config.data.clip_length}: {names}{more}"


def _counts(counts: dict[str, int]) -> str:
    """`GIF (12), MP4 (3)`, the most frequent first."""
    shown = [f"{name} ({count})" for name, count in list(counts.items())[:MOST_COUNTS]]
    return ", ".join(shown) + (f" and {len(counts) - MOST_COUNTS} others" if len(counts) > MOST_COUNTS else "")


def draw_sheet(config: Config) -> Path:
    """Writes the first training windows of the run as a new PNG in the current folder, a window a row."""
    import torch

    from fdm_cli import picture, video
    from fdm_cli.dataset import open_clips
    from fdm_cli.training_batches import draw_batch

    batch = draw_batch(config, open_clips(config), 0, SHEET_CLIPS, config.training.seed)
    frames, labels, markers = [], [], []
    columns = picture.spread(batch.frame_indices.shape[1], SHEET_FRAMES)
    for x_0, indices, observed, latent in zip(
        batch.x_0, batch.frame_indices, batch.observed, batch.latent, strict=True
    ):
        order = torch.argsort(indices)[columns]
        frames += list(video.to_uint8(x_0[order]))
        labels += [str(int(index)) for index in indices[order]]
        markers += [
            picture.OBSERVED if observed[place] else picture.LATENT if latent[place] else None for place in order
        ]
    source = expanded(config.data.source).resolve()
    path = _new_name(source.name if source.is_dir() else source.stem)
    picture.write_png(path, picture.contact_sheet(frames, labels=labels, markers=markers, columns=len(columns)))
    return path


def _new_name(stem: str) -> Path:
    """STEM.clips.png, or STEM-2.clips.png and so on when that is taken."""
    from fdm_cli.video import TRAINING_SHEET

    names = (f"{stem or 'data'}{'' if number == 1 else f'-{number}'}{TRAINING_SHEET}" for number in itertools.count(1))
    return next(path for path in map(Path, names) if not path.exists())
