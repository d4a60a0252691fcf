"""The held-out loss: how well the EMA weights predict on clips that training never sees.

Clips, windows, noise and timesteps are fixed and the same for every run on the same data, whatever its seed, its
masks, its timesteps and its loss weighting: the curves of two runs of one model size and one process can be laid over
each other (a loss is in units of the parameterization and of the process's normalisation). Where the draft is
trained, it is the draft's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fdm_cli.config import Config
from fdm_cli.dataset import Clips
from fdm_cli.diffusion import Process
from fdm_cli.distributed import Ranks
from fdm_cli.gradients import Losses
from fdm_cli.randomness import derive_seed
from fdm_cli.training_batches import draw_batch
from fdm_cli.unet import UNet

CLIPS = 64  # a multiple of 4
SEED = derive_seed("held-out")


@dataclass(frozen=True)
class HeldOutLoss:
    """One measurement.

    Attributes:
        loss: mean squared error on latent frames, over all clips.
        quartiles: the same over the clips with timesteps in each quarter of 0..T-1, little noise first.
    """

    loss: float
    quartiles: tuple[float, float, float, float]


def measure(model: UNet, process: Process, config: Config, clips: Clips, at_once: int, ranks: Ranks) -> HeldOutLoss:
    """Measures on CLIPS clips, shared out over the ranks.

    Args:
        model: with the EMA weights, in eval mode, on its device.
        process: the forward process.
        config: of the run.
        clips: the held-out ones.
        at_once: clips in one network call.
        ranks: all of them call this.
    """
    device = next(model.parameters()).device
    # As in sampling, no window has padding; and clips have their full length at every step of the training.
    data = replace(config.data, masks="filled", first_clip_length=0, growth_steps=0)
    config = replace(config, data=data, training=replace(config.training, timestep_shift=1.0, observed_blur=0.0))
    timesteps = ((torch.arange(CLIPS) + 0.5) / CLIPS * process.timesteps).long()
    of_clips = Losses(model, process, replace(config.training, loss_weighting="none"))
    losses = torch.zeros(CLIPS)
    starts = range(0, CLIPS, at_once)
    for start in starts[ranks.rank :: ranks.size]:
        count = min(at_once, CLIPS - start)
        batch = draw_batch(config, clips, start, count, SEED)
        batch = replace(batch, timestep=timesteps[start : start + count]).to(device)
        with torch.inference_mode():
            losses[start : start + count] = of_clips(batch)[0].cpu()
    quartiles = (ranks.mean(losses) * ranks.size).view(4, -1).mean(1).tolist()
    return HeldOutLoss(sum(quartiles) / 4, tuple(quartiles))
