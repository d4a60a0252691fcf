"""Trains variants of `moving-mnist-small` for equal processor time: `python -m tests.variants MINUTES FOLDER NAME ...`.

What the preset should be is decided by what comes out, see CONTRIBUTING.md. Each variant is the base below with the
values beside its name; its checkpoint lies in FOLDER/NAME, for `fdm evaluate`. One thread each: processor time is
then comparable even when the machine is shared.
"""

import sys
import time
from pathlib import Path

import torch

from fdm_cli.config import load_preset
from fdm_cli.dataset import open_clips
from fdm_cli.device import choose_device
from fdm_cli.run_folder import RunFolder
from fdm_cli.trainer import Trainer

BASE = [
    "data.clip_length=18",
    "data.first_clip_length=0",
    "data.growth_steps=0",
    "training.schedule=constant",
    "training.loss_weighting=none",
    "training.ema_decay=0.99",
    "training.learning_rate=1e-3",
    "training.compile=false",
    "training.warmup_steps=50",
]
TWO_LEVELS = ["model.model_channels=64", "model.channel_mult=[1,2]"]
VARIANTS = {
    "base": [],
    "no-positions": ["model.positions=none"],
    "normalised": ["model.attention_residual=normalised"],
    "two-levels": [*TWO_LEVELS, "model.attention_resolutions=[8,4]"],
    "patch-2": [*TWO_LEVELS, "model.attention_resolutions=[8]", "model.patch_size=2"],
    "narrow-deep": ["model.model_channels=96", "model.num_res_blocks=2", "model.positions=none"],
    "eps": ["diffusion.parameterization=eps"],
    "x_0": ["diffusion.parameterization=x_0"],
    "cosine": ["diffusion.betas=cosine"],
    "min-snr": ["training.loss_weighting=min-snr"],
    "x_0-weighting": ["training.loss_weighting=x_0"],
    "paper-masks": ["data.masks=paper"],
    "clip-160": ["data.clip_length=160"],
    "fp32": ["training.precision=fp32"],
    "batch-8": ["training.batch_size=8"],
}


def main() -> None:
    """Trains the named variants, or all, one after the other; one line each."""
    minutes, folder, names = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(VARIANTS)
    device = choose_device("cpu", threads=1)
    for name in names:
        config = load_preset("moving-mnist-small", BASE + VARIANTS[name])
        trainer = Trainer(config, open_clips(config), device, open_clips(config, "held-out"))
        began, losses = time.process_time(), []
        while time.process_time() - began < 60 * minutes:
            losses.append(trainer.train_step()[0])
        run = RunFolder(folder / name)
        with run.locked():
            run.save(trainer.state(), keep=1)
        held_out = trainer.measure_held_out()
        recent = torch.tensor(losses[-100:]).mean()
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        for end in range(len(losses) // 10, len(losses) + 1, max(1, len(losses) // 10)):
            print(f"  {end}: {torch.tensor(losses[max(0, end - 100) : end]).mean():.4f}")
        print(
            f"{name}: {parameters / 1e6:.2f} M, {trainer.step} steps, last 100 losses {recent:.4f}, "
            f"held-out {held_out.loss:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
