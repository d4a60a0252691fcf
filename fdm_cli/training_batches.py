"""What training steps train on: batches of clips, drawn by number, ahead of the one that is needed."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fdm_cli import video
from fdm_cli.config import Config
from fdm_cli.dataset import Clips
from fdm_cli.diffusion import shifted
from fdm_cli.errors import FdmError, RunFailed
from fdm_cli.masks import sample_masks
from fdm_cli.own_frames import OwnFrames
from fdm_cli.randomness import generator

T = TypeVar("T")

MOST_PROCESSES = 8  # that draw batches: they keep up with an H100
BATCHES_EACH = 2  # that each of them has in shared memory


@dataclass(frozen=True)
class Batch:
    """What one step trains on: videos (B, K, C, H, W), masks and indices (B, K), timestep (B,), noise like x_0."""

    x_0: Tensor
    frame_indices: Tensor
    observed: Tensor
    latent: Tensor
    timestep: Tensor
    eps: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device; from pinned memory the copy runs beside what the device does."""
        beside = device.type == "cuda"
        return Batch(**{name: tensor.to(device, non_blocking=beside) for name, tensor in vars(self).items()})

    def shared(self) -> Batch:
        """The same in memory that processes share. Raises RunFailed when there is none."""
        try:
            for tensor in vars(self).values():
                tensor.share_memory_()
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise RunFailed(
                f"no shared memory for a batch: {reason}", "a larger /dev/shm, or a smaller batch"
            ) from error
        return self

    def pin_memory(self) -> Batch:
        """The same in memory from which a GPU fetches by itself; DataLoader calls it by this name."""
        return Batch(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})


def draw_batch(
    config: Config, clips: Clips, first_number: int, size: int, seed: int, own: OwnFrames | None = None
) -> Batch:
    """Clips number `first_number`, `first_number` + 1, ... of the endless stream that the seed stands for.

    Each clip is a function of the seed and its number alone: the window, the clip, the timestep, the noise and how much
    the observed frames are blurred are drawn from its generator, in this order; before them whether those are `own`.

    In a long video the observed frames are the network's own, a little softer than real ones. One that has learnt from
    real ones alone hands that on, and each window adds to it; blurred ones teach it to make sharp frames of soft ones
    (conditioning augmentation: Ho et al., "Cascaded diffusion models for high fidelity image generation", 2021).
    What the network has drawn itself is `own`, and not blurred besides.
    """
    data, model = config.data, config.model
    batch_size, most_blur = config.training.batch_size, config.training.observed_blur
    # All windows of a batch have as many frames, whichever step their clips belong to.
    places = min(model.window, data.spanned(first_number // batch_size))
    eps = torch.empty(size, places, model.image_channels, model.image_size, model.image_size)
    videos, windows, timesteps, blurs = [], [], [], []
    for place in range(size):
        draws = generator(seed, "clip", first_number + place)
        spanned = data.spanned((first_number + place) // batch_size)
        of_own = own is not None and float(torch.rand((), generator=draws)) < config.training.own_share
        if own is not None and of_own:
            window, frames = own.draw(draws, places)
        else:
            window = sample_masks(spanned, places, draws, data.masks)
            # Of this length, or the ends of long videos would not be seen before windows span whole clips.
            frames = clips.of_length(spanned).clip(draws, window.frame_indices.numpy())
        videos.append(frames)
        windows.append(window)
        timesteps.append(draw_timestep(config, draws))
        eps[place].normal_(generator=draws)
        if most_blur:
            blurs.append((0.0 if of_own else most_blur) * torch.rand((), generator=draws))
    x_0, observed = video.to_model(np.concatenate(videos)).view_as(eps), torch.stack([w.observed for w in windows])
    if most_blur:
        x_0[observed] = blurred(x_0[observed], torch.stack(blurs).repeat_interleave(observed.sum(1)))
    return Batch(
        x_0=x_0,
        frame_indices=torch.stack([window.frame_indices for window in windows]),
        observed=observed,
        latent=torch.stack([window.latent for window in windows]),
        timestep=torch.tensor(timesteps),
        eps=eps,
    )


def blurred(frames: Tensor, share: Tensor) -> Tensor:
    """Frames (n, C, H, W) mixed with themselves blurred by (1, 2, 1) / 4 along both axes, of which `share` (n,) is."""
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    rows = (padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]) / 4
    soft = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    return frames.lerp(soft, share[:, None, None, None])


def draw_timestep(config: Config, generator: torch.Generator) -> int:
    """One of 0..T-1, at a shift of 1 each as often as any other.

    Others are `shifted`.
    Where x_t is mostly noise the network must learn from the observed frames; elsewhere it soon knows enough.
    """
    timesteps, shift = config.diffusion.timesteps, config.training.timestep_shift
    if shift == 1:
        return int(torch.randint(timesteps, (), generator=generator))
    u = float(torch.rand((), generator=generator, dtype=torch.float64))
    return min(timesteps - 1, int(timesteps * shifted(u, shift)))


class Ahead(Generic[T]):
    """Makes things by number, each while the one before is being used.

    Asking for number n returns it and starts making n + 1 in a thread. What is returned does not depend on the
    thread: any number may be asked for at any time, only those asked for in order were made beforehand. What
    `make` raises is raised where the thing is asked for.

    Args:
        make: a function of the number alone.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        # Ends with the interpreter, at the latest when the thing in the making is done.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[T]] | None = None

    def __call__(self, number: int) -> T:
        """Thing number `number`."""
        number_made, future = self._next or (None, None)
        made = future.result() if future is not None and number_made == number else self._make(number)
        self._next = number + 1, self._thread.submit(self._make, number + 1)
        return made


class AheadInProcesses(Generic[T]):
    """Like `Ahead`, but made in processes of their own, several things ahead.

    For a GPU: it takes a batch in less time than one is drawn in, and a thread that draws keeps the one that tells the
    GPU what to do waiting.

    Args:
        make: a function of the number alone; the processes are forks, so it need not be picklable.
        processes: how many.
        pin: whether things are brought into pinned memory, by their method `pin_memory`.
    """

    def __init__(self, make: Callable[[int], T], processes: int, *, pin: bool) -> None:
        self._make = make
        self._processes = processes
        self._pin = pin
        self._next: tuple[int, Iterator[T | FdmError]] | None = None

    def __call__(self, number: int) -> T:
        """Thing number `number`.

        Raises:
            FdmError: what `make` raised, or RunFailed when a process has ended.
        """
        number_made, made = self._next or (None, None)
        if made is None or number_made != number:
            self._next = made = None  # ends the processes
            made = self._from(number)
        self._next = number + 1, made
        try:
            thing = next(made)
        except RuntimeError as error:
            if not str(error).startswith(("DataLoader worker (pid", "Pin memory thread exited")):
                raise
            raise RunFailed(
                f"a process that draws batches has ended ({' '.join(str(error).split())[:100]})",
                "is there too little memory? --resume goes on from what was saved last",
            ) from error
        if isinstance(thing, FdmError):
            raise thing
        return thing

    def _from(self, number: int) -> Iterator[T | FdmError]:
        loader = DataLoader(
            _Numbered(self._make),
            batch_size=None,
            sampler=range(number, 2**62),
            num_workers=self._processes,
            prefetch_factor=BATCHES_EACH,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            worker_init_fn=partial(_live_and_die_with, os.getpid()),
            multiprocessing_context="fork",
        )
        # Signals are this process's business: the others have them blocked from the first moment. And PyTorch has the
        # end of a process raised wherever this one is, besides in `next`.
        handler = signal.getsignal(signal.SIGCHLD)
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, handler)


class _Numbered(Dataset[T | FdmError], Generic[T]):
    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> T | FdmError:
        try:
            return self._make(number)
        except FdmError as error:
            return error  # raised, it would come out as the text of a traceback


def _as_it_is(thing: T) -> T:
    return thing


def _live_and_die_with(parent: int, _: int) -> None:
    """In a new process: it ends when its parent does, or says so; a signal to the whole group says nothing to it."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def obey() -> None:
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()


def draw_ahead(draw: Callable[[int], Batch], config: Config, size: int, device: torch.device) -> Callable[[int], Batch]:
    """What gives batch after batch, drawn while the ones before are being used: by a thread, for a GPU by processes.

    Args:
        draw: gives the batch of a number.
        config: of the run.
        size: clips in a batch.
        device: that they are for.
    """
    if device.type != "cuda":
        return Ahead(draw)
    model = config.model
    pixels = size * model.window * model.image_channels * model.image_size**2
    processes = _drawing_processes(2 * 4 * pixels)  # two videos, fp32
    if not processes:
        return Ahead(lambda number: draw(number).pin_memory())
    return AheadInProcesses(lambda number: draw(number).shared(), processes, pin=True)


def _drawing_processes(batch_bytes: int) -> int:
    """How many can run beside this process and hand over their batches, which takes shared memory."""
    shared = Path("/dev/shm")  # noqa: S108  (where Linux has it)
    if "fork" not in multiprocessing.get_all_start_methods() or not shared.is_dir():
        return 0
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # training processes on this machine, a GPU each
    cores = len(os.sched_getaffinity(0)) // sharers
    held = shutil.disk_usage(shared).free // sharers // 2  # a container has 64 MB unless told otherwise
    return max(0, min(MOST_PROCESSES, cores - 1, held // (BATCHES_EACH * batch_bytes)))
