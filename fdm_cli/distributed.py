"""Processes that work together, as `torchrun` starts them: who am I, what did the others make, who speaks.

Rank 0 reads and writes files and talks. Without torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from fdm_cli.errors import BadInput, FdmError, RunFailed, Silenced, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

PATIENCE = timedelta(hours=12)  # for a rank that decodes data or makes previews; one that has died is noticed at once


@dataclass(frozen=True)
class Ranks:
    """The processes of a job.

    Attributes:
        rank: this one's number; 0 is the one that talks and writes.
        size: how many there are.
        local_rank: its number on this machine, and that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def gather(self, value: T) -> list[T]:
        """What each rank brought, by rank; every rank gets all of it. Values are pickled: tensors on the CPU."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.size
        with _failures():
            dist.all_gather_object(values, value)
        return cast(list[T], values)

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, for all; the others make nothing."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        box = [make() if self.rank == 0 else None]
        with _failures():
            dist.broadcast_object_list(box)
        return cast(T, box[0])

    def in_turn(self, make: Callable[[], T]) -> T:
        """Every rank makes its own, rank 0 first: what that leaves on disk, the others find."""
        if self.rank:
            self.barrier()
            return make()
        made = make()
        self.barrier()
        return made

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks of a tensor on the CPU, the same on all of them."""
        return self._reduced(values, "SUM") / self.size

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return value
        import torch

        return int(self._reduced(torch.tensor(value), "MAX"))

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' numbers."""
        return -self.largest(-value)

    def _reduced(self, values: torch.Tensor, operation: str) -> torch.Tensor:
        if self.size == 1:
            return values
        import torch.distributed as dist

        with _failures():
            dist.all_reduce(values, getattr(dist.ReduceOp, operation))
        return values

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self.largest(0)

    def clips_each(self, batch_size: int, accumulation: int) -> int:
        """A rank's share of a step's clips. Raises BadInput when they cannot be shared out evenly."""
        if batch_size % (self.size * accumulation):
            parts = f" in {accumulation} parts each" if accumulation > 1 else ""
            raise BadInput(
                f"training.batch_size {batch_size} cannot be shared out evenly over {self.size} processes{parts}",
                f"take a multiple of {self.size * accumulation}, as it counts the clips of all processes together, or "
                "start another number of processes",
            )
        return batch_size // self.size

    def device(self, device: torch.device) -> torch.device:
        """This rank's own GPU, where the device is one. Raises BadInput for fewer GPUs than ranks, and for MPS."""
        if self.size == 1 or device.type == "cpu":
            return device
        import torch
        import torch.distributed as dist

        if device.type == "cuda" and not dist.is_nccl_available():
            raise BadInput("this torch has no NCCL, by which GPUs talk", "--device cpu, or one process")
        if device.type != "cuda":
            raise BadInput(f"several processes cannot share the work on {device.type}", "--device cpu, or one process")
        if self.local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"{torch.cuda.device_count()} GPUs here, process {self.local_rank} needs one of its own",
                "start fewer with --nproc-per-node, or use --device cpu",
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as one whose gradients are averaged over the ranks; rank 0's weights go to all."""
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        with _failures():
            return DistributedDataParallel(model, gradient_as_bucket_view=True)


ALONE = Ranks()  # one process, no torchrun


@contextmanager
def _failures() -> Iterator[None]:
    """What a broken connection raises, as RunFailed."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RunFailed(
            "another process of this run ended unexpectedly",
            f"--resume goes on from what was saved last ({' '.join(str(error).split())[:100]})",
        ) from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that `torchrun` started, connected while the block runs; one alone without it.

    Of what the ranks raise, only the first to fail keeps its error; the others get `Silenced`, since they fail for the
    same reason, or because that one is gone.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://"))
        store = PrefixStore(f"fdm {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except ValueError as error:  # WORLD_SIZE and RANK, and not what belongs to them
        raise BadInput(f"several processes cannot meet: {error}", "start them with torchrun, or unset RANK") from None
    except RuntimeError as error:
        raise RunFailed(f"several processes cannot meet: {' '.join(str(error).split())[:200]}") from error
    try:
        yield Ranks(rank, size, int(os.environ.get("LOCAL_RANK", "0")))
    except Exception as error:
        if not _is_first(store, rank):
            raise Silenced(error.exit_code if isinstance(error, FdmError) else 1) from error
        if isinstance(error, RuntimeError) and "gloo" in str(error):  # inside DistributedDataParallel
            with _failures():
                raise
        raise
    else:
        dist.destroy_process_group()


def _is_first(store: Store, rank: int) -> bool:
    """Whether this rank is the first to ask; one whose store is out of reach is not, unless it is rank 0."""
    try:
        return store.add("first to fail", 1) == 1
    except RuntimeError:
        return rank == 0
