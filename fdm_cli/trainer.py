"""The training loop: a generator of step statistics; whoever runs it decides what to show.

Every random draw of a step is a function of the seed and of the clip's number (step * batch size + place
in the batch), dropout of the seed, the step, the part and the process. A resumed run therefore needs no random
state, and gives (on a CPU) bit for bit the weights of an uninterrupted one; and how a step's clips are shared out
over several processes or computed in parts changes nothing beyond rounding, where there is no dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fdm_cli import config as configuration
from fdm_cli import held_out, optimizer
from fdm_cli.checkpoint import FORMAT, Checkpoint, refuse_mismatch
from fdm_cli.compiled import compile_blocks, explained
from fdm_cli.config import Config, TrainingConfig
from fdm_cli.dataset import Clips
from fdm_cli.diffusion import Process
from fdm_cli.distributed import ALONE, Ranks
from fdm_cli.errors import BadInput, Interrupted, RunFailed
from fdm_cli.gradients import Losses, add_gradients
from fdm_cli.held_out import HeldOutLoss
from fdm_cli.own_frames import CLIPS_A_FILE, OwnFrames
from fdm_cli.preview import write_preview
from fdm_cli.randomness import derive_seed
from fdm_cli.run_folder import RunFolder
from fdm_cli.signals import StopSignals
from fdm_cli.training_batches import Batch, draw_ahead, draw_batch
from fdm_cli.unet import UNet

# Of what no shape shows, what weights do not depend on; and what their names show, as `refuse_unfit` has seen by then.
INDEPENDENT = (
    "model.dropout",
    "model.window",
    "model.image_size",
    "model.attention_resolutions",
    "model.draft",
    "model.patch_attention",
)
# Of a run that is resumed: its length, where its data lies (whether it is the same is seen by its content), and how
# the work is done and saved, which changes the result by rounding only, and by what dropout draws.
MAY_CHANGE = (
    "data.source",
    "training.steps",
    "training.accumulation",
    "training.precision",
    "training.activation_checkpointing",
    "training.compile",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.held_out_every",
    "training.preview_every",
)
# What can be added to a trained network, which it does not change before it is trained, and the names of its weights.
ADDED = {"draft": ("draft.", "of_draft."), "patch_attention": ("patch_attention.",)}
MAX_BAD_STEPS = 5  # steps in a row whose loss or gradient is not finite
_Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class StepStats:
    """One training step.

    Attributes:
        step: counts from 1.
        loss: mean over the batch of the (weighted) squared error on latent frames; of the draft's where that alone
            learns.
        gradient_norm: L2 norm before clipping.
        learning_rate: of this step.
        seconds: wall time of the step.
        held_out: measured after this step, if it was.
        preview: the GIF made after this step, if one was.
        no_picture: why one that was due could not be made.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    held_out: HeldOutLoss | None = None
    preview: Path | None = None
    no_picture: str | None = None

    def record(self) -> dict[str, Any]:
        """What metrics.jsonl keeps of it."""
        numbers = {key: getattr(self, key) for key in ("step", "loss", "gradient_norm", "learning_rate", "seconds")}
        if self.held_out is not None:
            numbers["held_out_loss"] = self.held_out.loss
            numbers["held_out_quartiles"] = list(self.held_out.quartiles)
        return numbers


class Trainer:
    """Network, EMA and optimizer of a run, and the step that changes them.

    Args:
        config: the run's.
        clips: to train on.
        device: to compute on.
        held_out_clips: to measure the held-out loss on; without them it is never measured.
        ranks: the processes that share the work; all of them make a trainer.

    Raises:
        BadInput: the batch cannot be shared out over the ranks.
    """

    def __init__(
        self,
        config: Config,
        clips: Clips,
        device: torch.device,
        held_out_clips: Clips | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.clips = clips
        self.own: OwnFrames | None = None
        self.held_out_clips = held_out_clips
        self.device = device
        self.ranks = ranks
        self.process = Process(config.diffusion)
        self.step = 0
        training = config.training
        self._clips_each = ranks.clips_each(training.batch_size, training.accumulation)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(training.seed, "weights"))
            self.model = UNet(config).to(device)
        self.optimizer = optimizer.make(self.model, training)
        self.scaler = GradScaler(device.type, enabled=training.precision == "fp16")
        self.ema = AveragedModel(self.model, multi_avg_fn=self._average)
        self.ema.eval()
        if training.compile:
            compile_blocks(self.model)
        self.losses = ranks.wrap(Losses(self.model, self.process, training))
        self.batches = draw_ahead(self._draw, config, self.clips_at_once, device)

    def _draw(self, number: int) -> Batch:
        """This rank's clips of a part of a step, counted over all steps; in a thread or process of its own."""
        training, size = self.config.training, self.clips_at_once
        if training.own_share and self.own is None:
            raise ValueError("training.own_share needs `make_own` before the first step")
        step, part = divmod(number, training.accumulation)
        first = step * training.batch_size + self.ranks.rank * self._clips_each + part * size
        return draw_batch(self.config, self.clips, first, size, training.seed, self.own)

    def train_step(self) -> tuple[float, float]:
        """One step of the optimizer on the next clips; returns loss and gradient norm, the same on all ranks.

        When either is not finite the step is counted but changes no weights.

        Raises:
            RunFailed: torch.compile cannot compile the network here.
        """
        training = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.train()
        parts = training.accumulation
        alone = self.losses.no_sync if isinstance(self.losses, DistributedDataParallel) else nullcontext
        losses = []
        for number in range(parts):
            part = self.batches(self.step * parts + number).to(self.device)
            # Dropout draws from torch's global generator; seeded anew for each part, it needs no saving.
            torch.manual_seed(derive_seed(training.seed, "dropout", self.step, number, self.ranks.rank))
            # Only the last part's backward pass averages the gradients, everything that was added up, over the ranks.
            with alone() if number + 1 < parts else nullcontext():
                losses.append(self._add_gradients(part))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.gradient_clip)
        values = float(self.ranks.mean(torch.stack(losses).mean().cpu())), float(norm)
        if all(map(math.isfinite, values)):
            self.scaler.step(self.optimizer)
            self.ema.update_parameters(self.model)
        self.scaler.update()
        self.step += 1
        return values

    def _average(self, averages: _Tensors, values: _Tensors, _: Tensor | int) -> None:
        """EMA with a warm-up: of n updates so far, the decay is at most (1 + n) / (10 + n)."""
        n = int(self.ema.n_averaged)  # what is handed over was brought to the device: to read it would wait for that
        weight = 1 - min(self.config.training.ema_decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averages, values, weight)

    def _add_gradients(self, part: Batch) -> Tensor:
        with explained("--set training.compile=false"):
            return add_gradients(self.losses, part, self.config.training.accumulation, self.scaler)

    def is_bad(self, loss: float, gradient_norm: float) -> bool:
        """Whether something is wrong with a step; that fp16 gradients overflow while their scale is found is normal."""
        overflow = not math.isfinite(gradient_norm) and self.scaler.get_scale() <= 1
        return not math.isfinite(loss) or overflow

    @property
    def clips_at_once(self) -> int:
        """In one network call of a step: what the memory is known to be enough for."""
        return self._clips_each // self.config.training.accumulation

    def measure_held_out(self) -> HeldOutLoss | None:
        """The held-out loss of the EMA weights; all ranks take part."""
        if self.held_out_clips is None:
            return None
        model, clips = cast(UNet, self.ema.module), self.held_out_clips
        return held_out.measure(model, self.process, self.config, clips, self.clips_at_once, self.ranks)

    def checkpoint(self) -> Checkpoint:
        """The EMA weights as they are, to sample from."""
        model = cast(UNet, self.ema.module)
        return Checkpoint(self.config, self.step, self.process, model, sha256="", format=FORMAT, resumable=True)

    def start_from(self, start: Checkpoint) -> None:
        """Takes a checkpoint's weights, at step 0; they must fit, see `refuse_unfit`."""
        weights = start.model.state_dict()
        for module in (self.model, self.ema.module):
            module.load_state_dict({**module.state_dict(), **weights})

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

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Goes on from a checkpoint's content.

        Returns:
            a remark for each setting that somebody has edited since, and that no `--set` may change.

        Raises:
            BadInput: it is that of another network or process.
        """
        saved = configuration.from_dict(state["config"], "checkpoint")
        edited = []
        for name, before, now in configuration.differences(saved, self.config):
            if name.startswith(("model.", "diffusion.")):
                raise BadInput(
                    f"the run's checkpoints have another {name} than its config.yaml",
                    "--run names another folder for another network or process",
                )
            if name not in MAY_CHANGE:
                if name == "training.weights":
                    raise BadInput(
                        f"the run trained {before}, and its optimizer knows nothing of other weights",
                        f"--init-from starts another run from it, with --set training.weights={now}",
                    )
                edited.append(f"{name} is {now} from here on, by config.yaml; it was {before}")
        for name, module in (("model", self.model), ("ema", self.ema.module)):
            refuse_mismatch(module.state_dict(), state[name], f"the checkpoint's {name} does not fit its configuration")
            module.load_state_dict(state[name])
        self.ema.n_averaged.fill_(state["ema_updates"])
        try:
            optimizer.load_moments(self.optimizer, state["optimizer"])
            if self.scaler.is_enabled() and state.get("scaler"):  # the scale begins anew where there was none
                self.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"the checkpoint's optimizer does not fit its configuration: {error}") from None
        self.step = state["step"]
        return edited


def refuse_unfit(start: Checkpoint, config: Config, path: Path) -> None:
    """Raises BadInput for weights that a run cannot start from, with the first key or setting that differs."""
    with torch.device("meta"):
        expected = UNet(config).state_dict()
    what = f"{path}: the weights do not fit the model to train"
    for part in added(start, config):
        expected = {name: value for name, value in expected.items() if not name.startswith(ADDED[part])}
    refuse_mismatch(expected, start.model.state_dict(), what)
    for name, own, wanted in configuration.differences(start.config.model, config.model, "model."):
        if name not in INDEPENDENT:
            raise BadInput(f"{what}: they were trained with {name} {own}, not {wanted}")


def added(start: Checkpoint, config: Config) -> list[str]:
    """What the network to train has and the one that it starts from has not: keys of ADDED."""
    lacks = [part for part in ADDED if getattr(start.config.model, part) == "none"]
    return [part for part in lacks if getattr(config.model, part) != "none"]


def refuse_random(config: Config, start: Checkpoint | None) -> None:
    """Raises BadInput where something would learn beside weights that stay random: that is worth nothing."""
    if config.training.own_share and start is None:
        raise BadInput(
            "training.own_share: frames that random weights draw are not worth learning from",
            "--init-from names the checkpoint whose frames they are to be",
        )
    weights = config.training.weights
    if weights not in ("patch_attention", "all_but_draft"):
        return
    if start is None:
        raise BadInput(
            f"training.weights {weights}: the other weights would stay as random as they are",
            "--init-from names the checkpoint that has them",
        )
    if "draft" in added(start, config):
        raise BadInput(
            f"training.weights {weights}: the draft would stay as random as it is",
            "train it first, --set training.weights=draft, and --init-from that run",
        )


def other_process(start: Checkpoint, config: Config) -> str | None:
    """What the weights that a run starts from were not trained for: the first setting of the process that differs."""
    for name, own, wanted in configuration.differences(start.config.diffusion, config.diffusion, "diffusion."):
        return f"the weights were trained with {name} {own}, this run has {wanted}"
    return None


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Of the step after `step` steps: rises linearly over the warm-up, then stays or falls to 0 just after the last."""
    warmup = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
    progress = max(0, step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return training.learning_rate * warmup * decay[training.schedule]


def make_own(trainer: Trainer, own: OwnFrames, stop: StopSignals) -> Iterator[int]:
    """Draws the frames that the run learns to continue, unless they are there; yields how many clips are finished.

    All ranks run this before `train`, of a run with `training.own_share`.

    Raises:
        BadInput: the run is beyond its first step and they are gone.
        Interrupted: a signal came.
        RunFailed: a file cannot be written.
    """
    trainer.ranks.barrier()  # until rank 0 has brought the folder in order
    missing = [path for path in own.files if not path.exists()]
    if missing and trainer.step:
        raise BadInput(
            f"{missing[0]} is gone, and the weights have learnt since they made it",
            "bring it back, or start another run with --init-from",
        )
    if missing:
        clips = trainer.config.training.own_clips
        for finished in own.make(trainer.checkpoint(), trainer.clips_at_once, trainer.ranks):
            yield min(finished, clips)
            if stop.received:
                raise Interrupted(
                    stop.received,
                    f"stopped while clips are drawn, about {min(finished, clips)} of {clips}; what is finished is "
                    f"kept, {CLIPS_A_FILE} at a time",
                    f"fdm train --run {own.folder.parent} --resume",
                )
    trainer.ranks.barrier()
    own.check()
    trainer.own = own


def train(trainer: Trainer, folder: RunFolder, stop: StopSignals) -> Iterator[StepStats]:
    """Trains up to the configured number of steps, saving as it goes; the folder is locked by the caller.

    Of several ranks all run this; rank 0 writes.

    Raises:
        Interrupted: a signal came, to whichever rank; the step was finished and saved.
        RunFailed: the loss was not finite several times in a row, or in no step at all; or a checkpoint could not be
            written.
    """
    training, ranks = trainer.config.training, trainer.ranks
    bad_steps = 0
    started_at = saved_at = trainer.step
    while trainer.step < training.steps:
        began = time.perf_counter()
        loss, norm = trainer.train_step()
        seconds = time.perf_counter() - began
        step = trainer.step
        bad_steps = bad_steps + 1 if trainer.is_bad(loss, norm) else 0
        measured = trainer.measure_held_out() if _due(step, training.held_out_every) else None
        signal_number = ranks.largest(stop.received or 0)
        stats = StepStats(step, loss, norm, learning_rate(training, step - 1), seconds, measured)
        if ranks.rank == 0:
            folder.append_metrics(stats.record())
        if bad_steps == MAX_BAD_STEPS or (bad_steps == step == training.steps):
            raise _not_finite(bad_steps, step, step - started_at == bad_steps, folder)
        # A checkpoint in a row of bad steps would be no good one to go back to; at the end there is no other.
        saved = (_due(step, training.checkpoint_every) and not bad_steps) or signal_number or step == training.steps
        if saved:
            if ranks.rank == 0:
                folder.save(trainer.state(), training.keep_checkpoints)
                stats = replace(stats, no_picture=_failure(folder.draw_losses))
            saved_at = step
        if ranks.rank == 0 and not bad_steps and _due(step, training.preview_every):
            path = folder.sample_path(step)
            failure = _failure(partial(write_preview, trainer.checkpoint(), path, trainer.clips_at_once))
            stats = replace(stats, no_picture=failure) if failure else replace(stats, preview=path)
        yield stats
        if signal_number:
            ranks.barrier()  # no rank goes, and has the others stopped by torchrun, before everything is saved
            raise Interrupted(
                signal_number,
                f"stopped after step {step}; saved at step {saved_at}",
                f"fdm train --run {folder.path} --resume",
            )


def _failure(draw: Callable[[], object]) -> str | None:
    """Why a picture could not be made; the training is worth more than that."""
    try:
        draw()
    except (BadInput, RunFailed, OSError) as error:
        return str(error)
    return None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _not_finite(count: int, step: int, from_the_start: bool, folder: RunFolder) -> RunFailed:
    newest = folder.checkpoints()[-1:]
    if not from_the_start and newest:
        hint = f"the last good checkpoint is {newest[0]}; --init-from it with a lower training.learning_rate"
    elif newest:
        hint = f"not one step was finite: {newest[0]} is no good start; take an older one, or other data"
    else:
        hint = "not one checkpoint was saved: lower training.learning_rate"
    steps = f"{count} steps in a row" if count > 1 else "a step"
    return RunFailed(f"the loss was not finite in {steps}, up to step {step}", hint)
