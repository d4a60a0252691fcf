"""The training loop: a generator of step statistics; whoever runs it decides what to show.

Every random draw of a step is a function of the seed and of the clip's number (step * batch size + place
in the batch), dropout of the seed and the step. A resumed run therefore needs no random state, and gives
bit for bit the weights of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel

from fdm_cli import config as configuration
from fdm_cli.batches import Ahead, Batch, draw_batch
from fdm_cli.checkpoint import load_checkpoint, refuse_mismatch
from fdm_cli.config import Config, TrainingConfig
from fdm_cli.dataset import Clips
from fdm_cli.diffusion import Process
from fdm_cli.errors import Interrupted, RunFailed
from fdm_cli.gradients import add_gradients
from fdm_cli.randomness import derive_seed
from fdm_cli.run_folder import RunFolder, StopSignals
from fdm_cli.unet import UNet

MAX_BAD_STEPS = 5  # steps in a row whose loss or gradient is not finite


@dataclass(frozen=True)
class StepStats:
    """One training step.

    Attributes:
        step: counts from 1.
        loss: mean over the batch of the squared error on latent frames.
        gradient_norm: L2 norm before clipping.
        seconds: wall time of the step.
    """

    step: int
    loss: float
    gradient_norm: float
    seconds: float


class Trainer:
    """Network, EMA and optimizer of a run, and the step that changes them."""

    def __init__(self, config: Config, clips: Clips, device: torch.device) -> None:
        self.config = config
        self.clips = clips
        self.device = device
        self.process = Process(config.diffusion)
        self.step = 0
        seed = config.training.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "weights"))
            self.model = UNet(config).to(device)
        training = config.training
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        self.scaler = GradScaler(device.type, enabled=training.precision == "fp16")
        self.ema = AveragedModel(self.model, multi_avg_fn=_ema_update(training.ema_decay))
        self.batches = Ahead(self._draw)

    def _draw(self, step: int) -> Batch:
        """What the step after `step` steps trains on; called in a thread of its own, one step ahead."""
        training = self.config.training
        batch = draw_batch(self.config, self.clips, step * training.batch_size, training.batch_size, training.seed)
        return batch.pinned() if self.device.type == "cuda" else batch

    def train_step(self) -> tuple[float, float]:
        """One AdamW step on the next clips; returns loss and gradient norm.

        When either is not finite the step is counted but changes no weights.
        """
        training = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        losses = []
        for number, part in enumerate(self.batches(self.step).split(training.accumulation)):
            # Dropout draws from torch's global generator; seeded by the step and the part, it needs no saving.
            torch.manual_seed(derive_seed(training.seed, "dropout", self.step, number))
            losses.append(add_gradients(self.model, self.process, part.to(self.device), training, self.scaler))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.gradient_clip)
        values = float(torch.stack(losses).mean()), float(norm)
        if all(map(math.isfinite, values)):
            self.scaler.step(self.optimizer)
            self.ema.update_parameters(self.model)
        self.scaler.update()
        self.step += 1
        return values

    def start_from(self, path: Path) -> None:
        """Takes the weights of a checkpoint of any known format, at step 0.

        Raises:
            BadInput: unreadable, or of another architecture, with the first key that differs.
        """
        weights = load_checkpoint(path).model.state_dict()
        refuse_mismatch(self.model.state_dict(), weights, f"{path}: the weights do not fit the model to train")
        self.model.load_state_dict(weights)
        self.ema.module.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds; see `checkpoint`."""
        return {
            "config": configuration.to_dict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "ema_updates": int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's content."""
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.ema.n_averaged.fill_(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.step = state["step"]


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Of the step after `step` steps: rises linearly over the warm-up, then stays or falls to 0 at the last step."""
    warmup = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
    progress = max(0, step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return training.learning_rate * warmup * decay[training.schedule]


def _ema_update(decay: float) -> Any:
    """EMA with a warm-up: of n updates so far, the decay is at most (1 + n) / (10 + n)."""

    def update(averages: list[Tensor], values: list[Tensor], updates: Tensor) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averages, values, weight)

    return update


def train(trainer: Trainer, folder: RunFolder, stop: StopSignals) -> Iterator[StepStats]:
    """Trains up to the configured number of steps, saving as it goes; the folder is locked by the caller.

    Raises:
        Interrupted: a signal came; the step was finished and saved.
        RunFailed: the loss was not finite several times in a row, or a checkpoint could not be written.
    """
    training = trainer.config.training
    bad_steps = 0
    saved_at = trainer.step
    while trainer.step < training.steps:
        started = time.perf_counter()
        loss, norm = trainer.train_step()
        stats = StepStats(trainer.step, loss, norm, time.perf_counter() - started)
        bad_steps = 0 if np.isfinite([loss, norm]).all() else bad_steps + 1
        if bad_steps == MAX_BAD_STEPS:
            newest = folder.checkpoints()[-1:]
            raise RunFailed(
                f"the loss was not finite in {bad_steps} steps in a row, up to step {trainer.step}",
                f"the last good checkpoint is {newest[0]}" if newest else "lower training.learning_rate",
            )
        folder.append_metrics(asdict(stats))
        due = trainer.step % training.checkpoint_every == 0 or trainer.step == training.steps
        # A checkpoint after a bad step would be as good as any, but the run may be about to be given up.
        if (due or stop.received is not None) and not bad_steps:
            folder.save(trainer.state(), training.keep_checkpoints)
            saved_at = trainer.step
        yield stats
        if stop.received is not None:
            raise Interrupted(
                stop.received,
                f"stopped after step {trainer.step}; saved at step {saved_at}",
                f"fdm train --run {folder.path} --resume",
            )
