"""Peak memory of a training step or of sampling, without a GPU and without taking the memory.

The real network, loss, autograd, autocast, optimizer and EMA run on ghosts (`ghost.py`), and the bytes alive are
counted. What holds:

* For a training step every frame of every window is latent. That is the worst case: the decoder computes latent
  frames only, so the masks that are drawn in training need at most this much. Only a draft that learns may need more
  where many are observed: that is tried, too.
* Operators and their saved results are those of a CPU, where the estimate agrees with what PyTorch's allocator
  reports (tests/test_memory.py). A GPU differs in the buffers that kernels take for themselves (cuDNN's workspace
  for a convolution, cuBLAS's) and in how attention over positions keeps its results: the memory-efficient and flash
  kernels of a GPU keep as little as the CPU's, and a GPU that falls back to the plain one keeps P x P weights a
  head and frame. Half-precision copies of the weights, which autocast keeps during a step, are counted.
* On top comes a margin, `Margin`: a fixed part (CUDA's context and the workspaces; on a CPU the kernels' buffers)
  and a share for fragmentation.
* Not counted: `torch.compile`, which usually needs less; several hundred bytes a window of masks made on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel

from fdm_cli import optimizer, samplers
from fdm_cli.attention import Distances
from fdm_cli.budget import T4_USABLE, Budget
from fdm_cli.config import Config, TrainingConfig
from fdm_cli.diffusion import Process
from fdm_cli.errors import FdmError
from fdm_cli.ghost import Ledger, empty, haunt
from fdm_cli.gradients import Losses, add_gradients
from fdm_cli.training_batches import Batch
from fdm_cli.unet import UNet
from fdm_cli.window import Window

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]

MIB = 2**20
SMALL, LARGE = 8, 16  # windows in the two experiments that a line is drawn through
MOST = 65_536  # windows; larger batches are not looked for


class NotCounted(FdmError):
    """The estimate could not be made: an operator that ghosts cannot stand in for."""


@dataclass(frozen=True)
class Margin:
    """What is added to a peak.

    Attributes:
        fixed: bytes.
        share: of the peak.
    """

    fixed: int
    share: float

    def on(self, peak: int) -> int:
        """Bytes to add to a peak."""
        return self.fixed + int(self.share * peak)

    def fits(self, peak: int, budget: int) -> bool:
        """Whether a peak and its margin stay within a budget."""
        return peak + self.on(peak) <= budget

    def room(self, budget: int) -> int:
        """The largest peak that fits a budget; 0 when none does."""
        room = max(int((budget - self.fixed) / (1 + self.share)) - 1, 0)
        while self.fits(room + 1, budget):
            room += 1
        return room


MARGINS = {"cuda": Margin(768 * MIB, 0.05), "cpu": Margin(64 * MIB, 0.10), "mps": Margin(256 * MIB, 0.10)}


@dataclass(frozen=True)
class Standing:
    """How a configuration stands against a device: bytes usable before the margin, whether it fits, what would."""

    usable: int
    fits: bool
    largest_batch: int


@dataclass(frozen=True)
class TrainingMemory:
    """A training step's memory, in bytes.

    Attributes:
        parameters: the network's weights.
        gradients: all of them, at the end of the backward pass. With one rank hardly any of them is there yet at the
            peak, which is then less than the sum of the parts.
        optimizer: its moments: AdamW's two, Muon's one of each weight matrix.
        ema: the averaged weights.
        activations: what else is alive at the peak: what the backward pass needs, the batch, half-precision
            weights, temporary results, and gradients that are there already.
        peak: the most that is alive at once, of all of these.
        margin: to be added to the peak.
        budget: what is available; None when the system does not say.
        fits: peak and margin within the budget; None without one.
        largest_batch: clips a step, all parts and ranks together, that fit with everything else as it is; 0 when
            none does, None without a budget.
        t4: the same against a T4, with the margin of a GPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    peak: int
    margin: int
    budget: int | None
    fits: bool | None
    largest_batch: int | None
    t4: Standing


@dataclass(frozen=True)
class SamplingMemory:
    """The memory of sampling a batch of windows, in bytes; see TrainingMemory. `batch` counts windows."""

    batch: int
    parameters: int
    activations: int
    peak: int
    margin: int
    budget: int | None
    fits: bool | None
    largest_batch: int | None
    t4: Standing


class _Line:
    """Bytes alive as functions of the batch.

    The same operators run whatever the batch is, so the n-th allocation is the same one, and the bytes alive after
    it are linear in the batch: two experiments tell all of them, and the peak is the highest of many lines.
    """

    def __init__(self, history: Callable[[int], list[int]]) -> None:
        small, large = history(SMALL), history(LARGE)
        if len(small) != len(large):  # another kernel was chosen: only the peaks can be compared
            small, large = [max(small)], [max(large)]
        self._lines = [(a, (b - a) / (LARGE - SMALL)) for a, b in zip(small, large, strict=True)]

    def peak(self, batch: int) -> int:
        """The highest, for a batch."""
        return round(max(a + slope * (batch - SMALL) for a, slope in self._lines))

    def largest(self, room: int) -> int:
        """The largest batch whose peak fits; 0 when none does."""
        low, high = 0, MOST + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= room else (low, middle)
        return low


class _Experiment:
    """Peaks of something that is run on ghosts for one batch or another."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}

    def _history(self, batch: int) -> list[int]:
        """Bytes alive after each allocation of a run with this batch."""
        raise NotImplementedError

    @cached_property
    def _line(self) -> _Line:
        return _Line(self._history)

    def peak(self, batch: int) -> int:
        """Bytes at the peak. Batches up to 16 are run, larger ones follow from two that are run."""
        if batch > LARGE:
            return self._line.peak(batch)
        if batch not in self._peaks:
            self._peaks[batch] = max(self._history(batch))
        return self._peaks[batch]

    def largest(self, room: int) -> int:
        """The largest batch whose peak is within `room` bytes; 0 when not even 1 is."""
        batch = self._line.largest(room)
        while 0 < batch <= LARGE and self.peak(batch) > room:  # a small batch may be run in another way
            batch -= 1
        return batch or int(self.peak(1) <= room)  # one window alone takes less than its share of many


class TrainingStep(_Experiment):
    """A step of a configuration, on ghosts. Batches here are the clips of one part of a step on one rank.

    Args:
        config: the run's; model, precision, accumulation and checkpointing count.
        ranks: that share a step; with more than one, DistributedDataParallel keeps the gradients from step to step.

    Raises:
        NotCounted: see there. So do the methods.
    """

    def __init__(self, config: Config, ranks: int = 1) -> None:
        super().__init__()
        self.config = config
        self._ranks = ranks
        self._ledger = Ledger()
        self._model = _ghost_model(config, self._ledger).train()
        self.parameters = self._ledger.alive
        self._process = Process(config.diffusion)
        self._optimizer = optimizer.make(self._model, config.training)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        _counted(self._optimizer.step)
        self._optimizer.zero_grad(set_to_none=True)
        self.optimizer = self._ledger.alive - self.parameters
        self._ema = AveragedModel(self._model, multi_avg_fn=_lerp)
        self._ema.n_averaged.fill_(1)
        self.ema = self._ledger.alive - self.parameters - self.optimizer
        self.gradients = sum(parameter.nbytes for parameter in trained)

    @property
    def parts(self) -> int:
        """How many parts a step's clips are computed in, on all ranks together."""
        return self.config.training.accumulation * self._ranks

    def with_training(self, **changes: object) -> TrainingStep:
        """The same network with other values of `training`; the ghosts are shared, so use one at a time."""
        other = TrainingStep.__new__(TrainingStep)
        vars(other).update({key: value for key, value in vars(self).items() if key != "_line"}, _peaks={})
        training = dataclasses.replace(self.config.training, **changes)  # type: ignore[arg-type]
        other.config = dataclasses.replace(self.config, training=training)
        return other

    def activations(self, batch: int) -> int:
        """Bytes at the peak besides parameters, optimizer and EMA; at least 0."""
        kept = self.gradients if self._ranks > 1 else 0
        return max(self.peak(batch) - self.parameters - self.optimizer - self.ema - kept, 0)

    def _history(self, batch: int) -> list[int]:
        training = self.config.training
        self._model.activation_checkpointing = training.activation_checkpointing
        scaler = GradScaler("cpu", enabled=training.precision == "fp16")
        self._ledger.forget()

        def step(observed: int) -> None:
            ahead = self._clips(batch)  # the next part's, made meanwhile
            # With more than one part the gradients of the first are there while the second is computed.
            for _ in range(min(training.accumulation, 2)):
                self._part(batch, training, scaler, observed)
            scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), training.gradient_clip)
            scaler.step(self._optimizer)
            self._ema.update_parameters(self._model)
            del ahead

        for observed in self._splits(training):
            _counted(partial(step, observed))
            self._optimizer.zero_grad(set_to_none=True)
        kept = self.gradients if self._ranks > 1 else 0
        return [alive + kept for alive in self._ledger.history]

    def _clips(self, batch: int) -> Batch:
        model, ledger = self.config.model, self._ledger
        frames = min(model.window, self.config.data.clip_length)
        shape = (batch, frames, model.image_channels, model.image_size, model.image_size)
        latent = torch.ones(batch, frames, dtype=torch.bool)
        return Batch(
            x_0=empty(ledger, *shape),
            frame_indices=torch.arange(frames).expand(batch, -1),
            observed=~latent,
            latent=latent,
            timestep=torch.zeros(batch, dtype=torch.int64),
            eps=empty(ledger, *shape),
        )

    def _splits(self, training: TrainingConfig) -> list[int]:
        """Numbers of observed frames where a step needs most: the network with none, a draft that learns with many."""
        frames = min(self.config.model.window, self.config.data.clip_length)
        of_network = [] if training.weights == "draft" else [0]
        if self.config.model.draft == "none" or training.weights not in ("all", "draft"):
            return of_network
        return [*of_network, max(frames // 2, min(frames - 1, 12))]

    def _part(self, batch: int, training: TrainingConfig, scaler: GradScaler, observed: int) -> None:
        clips = self._clips(batch)
        frames = clips.latent.shape[1]
        window = _ghost_window(self._ledger, batch, frames, frames - observed, 2 * self.config.data.clip_length - 1)
        losses = Losses(self._model, self._process, training)
        add_gradients(losses.train(), clips, training.accumulation, scaler, window)


class SamplingCall(_Experiment):
    """Sampling a batch of windows, on ghosts: the network without gradients, and the buffers of a sampler.

    The solver with the longest memory (DPM-Solver++(2M)) stands for all. History guidance adds a call on fewer
    frames, when the first has given its memory back.

    Args:
        config: a checkpoint's.
        frames: of a window.
        latent: how many of them are latent; all, when not given, which needs the most.
        distances: between frames, that a window has at most, see `batch.most_distances`; when not
            given, as many as there are in the clips that the model was trained on.

    Raises:
        NotCounted: see there. So do the methods.
    """

    def __init__(self, config: Config, frames: int, latent: int | None = None, distances: int | None = None) -> None:
        super().__init__()
        self._config = config
        self._frames = frames
        self._latent = frames if latent is None else latent
        self._distances = distances or 2 * config.data.clip_length - 1
        self._ledger = Ledger()
        self._model = _ghost_model(config, self._ledger).eval()
        self._process = Process(config.diffusion)
        self.parameters = self._ledger.alive

    def _history(self, batch: int) -> list[int]:
        model, ledger = self._config.model, self._ledger
        shape = (batch, self._frames, model.image_channels, model.image_size, model.image_size)
        ledger.forget()

        def call() -> None:
            x_0 = empty(ledger, *shape)
            latent = torch.arange(self._frames) >= self._frames - self._latent
            masks = {"observed_mask": ~latent.expand(batch, -1), "latent_mask": latent.expand(batch, -1)}
            indices = torch.arange(self._frames).expand(batch, -1)
            window = _ghost_window(ledger, batch, self._frames, self._latent, self._distances)

            def denoise(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                return self._model(x_t, timestep, x_0=x_0, frame_indices=indices, **masks, window=window)

            last = self._process.timesteps - 1
            steps = samplers.sample(
                denoise,
                self._process,
                empty(ledger, *shape),
                [last, last // 2, 0],
                samplers.DPMSolver(),
                lambda: empty(ledger, *shape),
            )
            with torch.no_grad():
                for _ in steps:
                    pass

        _counted(call)
        return ledger.history


def training_memory(step: TrainingStep, budget: Budget | None, device: str = "cpu") -> TrainingMemory:
    """The memory of one rank's training step, against a budget and against a T4.

    Args:
        step: of the run's configuration.
        budget: of one rank; None when it is not known.
        device: `cuda`, `cpu` or `mps`: whose margin is added.

    Raises:
        NotCounted: the estimate could not be made.
    """
    batch = step.config.training.batch_size // step.parts
    peak = step.peak(batch)
    margin = MARGINS[device]
    return TrainingMemory(
        parameters=step.parameters,
        gradients=step.gradients,
        optimizer=step.optimizer,
        ema=step.ema,
        activations=step.activations(batch),
        peak=peak,
        margin=margin.on(peak),
        budget=budget.size if budget else None,
        fits=margin.fits(peak, budget.size) if budget else None,
        largest_batch=step.parts * step.largest(margin.room(budget.size)) if budget else None,
        t4=_against_t4(step, batch, step.parts),
    )


def sampling_memory(call: SamplingCall, batch: int, budget: Budget | None, device: str = "cpu") -> SamplingMemory:
    """The memory of sampling `batch` windows at once, against a budget and against a T4.

    Args:
        call: what is sampled.
        batch: windows in one network call.
        budget: None when it is not known. Memory that the loaded model already has must be part of it.
        device: `cuda`, `cpu` or `mps`: whose margin is added.

    Raises:
        NotCounted: the estimate could not be made.
    """
    peak = call.peak(batch)
    margin = MARGINS[device]
    return SamplingMemory(
        batch=batch,
        parameters=call.parameters,
        activations=peak - call.parameters,
        peak=peak,
        margin=margin.on(peak),
        budget=budget.size if budget else None,
        fits=margin.fits(peak, budget.size) if budget else None,
        largest_batch=call.largest(margin.room(budget.size)) if budget else None,
        t4=_against_t4(call, batch, 1),
    )


def _against_t4(experiment: _Experiment, batch: int, parts: int) -> Standing:
    margin = MARGINS["cuda"]
    return Standing(
        T4_USABLE,
        margin.fits(experiment.peak(batch), T4_USABLE),
        parts * experiment.largest(margin.room(T4_USABLE)),
    )


def _counted(work: Callable[[], object]) -> None:
    """Runs on ghosts; what they cannot do becomes one typed error."""
    try:
        work()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise NotCounted(f"the memory cannot be estimated: {error}") from error


def _ghost_model(config: Config, ledger: Ledger) -> UNet:
    with torch.device("meta"):
        model = UNet(config)
    haunt(model, ledger)
    return model


def _ghost_window(ledger: Ledger, batch: int, frames: int, latent: int, most_distances: int) -> Window:
    """A window as `Window.of` makes it, with as many different distances between frames as there can be."""
    distances = batch * min(frames * (frames - 1) + 1, most_distances)
    places = torch.arange(frames).expand(batch, -1)
    return Window(
        # Where all may be latent, one is observed besides: patch attention needs the most for many latent ones.
        observed=places < (frames - latent or 1),
        latent=places >= frames - latent,
        allowed=empty(ledger, batch, frames, frames, dtype=torch.bool),
        distances=Distances(
            empty(ledger, distances, 3),
            empty(ledger, distances, dtype=torch.int64),
            empty(ledger, batch, frames, frames, dtype=torch.int64),
        ),
        clip_of_frame=empty(ledger, batch * frames, dtype=torch.int64),
        latent_frames=empty(ledger, batch * latent, dtype=torch.int64),
    )


def _lerp(averages: Tensors, values: Tensors, _updates: object) -> None:
    """The trainer's update of the EMA, whatever its weight."""
    torch._foreach_lerp_(averages, values, 0.5)
