"""Trains variants of `moving-mnist-small` for equal processor time: `python -m tests.variants MINUTES FOLDER NAME ...`.

What the preset should be is decided by what comes out, see CONTRIBUTING.md. Each variant is the base below with the
values beside its name; its checkpoint lies in FOLDER/NAME, for `fdm evaluate`. One thread each: processor time is
then comparable even when the machine is shared. Losses of different parameterizations, weightings and normalisations do
not compare; what is printed are therefore errors of the network's estimate of x_0.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from fdm_cli.config import load_preset
from fdm_cli.dataset import Clips, open_clips
from fdm_cli.device import choose_device
from fdm_cli.metrics import psnr
from fdm_cli.randomness import generator
from fdm_cli.run_folder import RunFolder
from fdm_cli.trainer import Trainer
from fdm_cli.video import to_model

BASE = [
    "model.draft=none",
    "model.patch_attention=none",
    "training.observed_blur=0",
    "data.clip_length=18",
    "data.first_clip_length=0",
    "data.growth_steps=0",
    "training.ema_decay=0.99",
    "training.warmup_steps=50",
]
VARIANTS = {
    "base": [],
    "adamw": ["training.optimizer=adamw"],
    "muon-2e-3": ["training.learning_rate=2e-3"],
    "patch-1": ["model.patch_size=1", "model.channel_mult=[1,2,4]"],
    "patch-4": ["model.patch_size=4", "model.channel_mult=[1]", "model.model_channels=128"],
    "no-bias": ["model.temporal_bias=none"],
    "normalised-residual": ["model.attention_residual=normalised"],
    "eps": ["diffusion.parameterization=eps"],
    "x_0": ["diffusion.parameterization=x_0"],
    "even-timesteps": ["training.timestep_shift=1"],
    "min-snr": ["training.loss_weighting=min-snr"],
    "attend-16": ["model.attention_resolutions=[8,16]"],
    "wide": ["model.model_channels=64"],
    "two-blocks": ["model.num_res_blocks=2"],
    "cosine": ["diffusion.betas=cosine"],
    "paper-masks": ["data.masks=paper"],
    "filled-masks": ["data.masks=filled"],
    "batch-4": ["training.batch_size=4"],
    "batch-16": ["training.batch_size=16"],
    "clip-160": ["data.clip_length=160"],
    "patch-attention": ["model.patch_attention=observed"],
    "draft": ["model.draft=motion"],
    "both": ["model.draft=motion", "model.patch_attention=observed"],
}
GIVEN, CLIPS = 8, 64
NOISE = 0.2  # deviation of the noise that is to be taken away, of pixels in [0, 1]


def main() -> None:
    """Trains the named variants, or all, one after the other; one line each."""
    if len(sys.argv) < 3 or not VARIANTS.keys() >= set(sys.argv[3:]):
        sys.exit(__doc__)
    minutes, folder, names = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(VARIANTS)
    device = choose_device("cpu", threads=1)
    for name in names:
        config = load_preset("moving-mnist-small", BASE + VARIANTS[name])
        trainer = Trainer(config, open_clips(config), device)
        began = time.process_time()
        while time.process_time() - began < 60 * minutes:
            trainer.train_step()
        run = RunFolder(folder / name)
        with run.locked():
            run.save(trainer.state(), keep=1)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        last = config.diffusion.timesteps - 1
        held_out = open_clips(config, "held-out")
        blind = error_by_frame(trainer, held_out, last)
        sighted = error_by_frame(trainer, held_out, timestep_of(trainer, NOISE))
        one, eight, clear = (psnr(float(error)) for error in (blind[0], blind.mean(), sighted.mean()))
        print(
            f"{name}: {parameters / 1e6:.2f} M, {trainer.step} steps; from pure noise {one:.2f} dB one ahead, "
            f"{eight:.2f} dB over eight; from noise of {NOISE} {clear:.2f} dB",
            flush=True,
        )


def timestep_of(trainer: Trainer, deviation: float) -> int:
    """The first timestep whose noise has at least this deviation, of pixels in [0, 1]."""
    abar, std = trainer.process.alphas_cumprod, trainer.config.diffusion.data_std
    return int((((1 - abar) / abar).sqrt() * std / 2 < deviation).sum())


@torch.inference_mode()
def error_by_frame(trainer: Trainer, clips: Clips, timestep: int) -> torch.Tensor:
    """Squared error of the estimate of x_0, pixels in [0, 1], on each frame of the window after the given ones."""
    window, model, process = trainer.config.model.window, trainer.ema.module, trainer.process
    indices, errors = torch.arange(window)[None], torch.zeros(window - GIVEN)
    observed = indices < GIVEN
    for number in range(CLIPS):
        draws = generator("variants", number)
        x_0 = to_model(clips.of_length(window).clip(draws, np.arange(window)))[None]
        at, eps = torch.tensor([timestep]), torch.randn(x_0.shape, generator=draws)
        x_t = process.q_sample(x_0, at, eps)
        output = model(x_t, at, x_0=x_0, frame_indices=indices, observed_mask=observed, latent_mask=~observed)
        off = process.predict_x_0(x_t, at, output).clamp(-1, 1) - x_0
        errors += off[0, GIVEN:].square().mean(dim=(1, 2, 3)) / 4
    return errors / CLIPS


if __name__ == "__main__":
    main()
