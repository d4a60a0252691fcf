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
    "data.clip_length=30",
    "data.masks=filled",
    "model.patch_size=4",
    "model.model_channels=64",
    "model.channel_mult=[1,2]",
    "model.attention_resolutions=[8,4]",
    "model.attention_residual=plain",
    "diffusion.betas=linear",
    "diffusion.parameterization=v",
    "training.batch_size=4",
    "training.learning_rate=1e-3",
    "training.warmup_steps=100",
    "training.ema_decay=0.99",
    "training.precision=bf16",
]
VARIANTS = {
    "base": [],
    "masks-paper": ["data.masks=paper"],
    "eps": ["diffusion.parameterization=eps"],
    "x0": ["diffusion.parameterization=x_0"],
    "min-snr": ["training.loss_weighting=min-snr"],
    "cosine": ["diffusion.betas=cosine"],
    "normalised": ["model.attention_residual=normalised"],
    "batch-8": ["training.batch_size=8"],
    "d": ["data.clip_length=18", "training.learning_rate=5e-4"],
    "e": ["data.clip_length=18", "model.model_channels=128", "model.channel_mult=[1]", "model.attention_resolutions=[8]"],
    "f": ["data.clip_length=18", "model.positions=learned"],
    "g": ["data.clip_length=18", "model.model_channels=128", "model.channel_mult=[1]", "model.attention_resolutions=[8]", "model.positions=learned"],
    "h": ["data.clip_length=18", "model.model_channels=96", "model.channel_mult=[1]", "model.attention_resolutions=[8]", "model.num_res_blocks=2"],
    "i": ["data.clip_length=18", "model.model_channels=128", "model.channel_mult=[1]", "model.attention_resolutions=[8]", "training.learning_rate=2e-3"],
    "clip-160": ["data.clip_length=160"],
    "fp32": ["training.precision=fp32"],
    "rate-2e-3": ["training.learning_rate=2e-3"],
    "patch-2": ["model.patch_size=2", "model.attention_resolutions=[8]"],
    "patch-2-deep": ["model.patch_size=2", "model.channel_mult=[1,2,2]"],
    "wide-flat": ["model.model_channels=128", "model.channel_mult=[1]", "model.attention_resolutions=[8]"],
    "narrow": ["model.model_channels=32", "model.channel_mult=[2,4]"],
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
        recent = torch.tensor(losses[-100:]).mean()
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        for end in range(len(losses) // 10, len(losses) + 1, max(1, len(losses) // 10)):
            print(f"  {end}: {torch.tensor(losses[max(0, end - 100) : end]).mean():.4f}")
        print(f"{name}: {parameters / 1e6:.2f} M, {trainer.step} steps, last 100 losses {recent:.4f}", flush=True)


if __name__ == "__main__":
    main()
