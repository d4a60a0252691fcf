"""Processes that work together, as `torchrun` starts them: who am I, and what did the others make."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist

from fdm_cli.errors import RunFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a job.

    Attributes:
        rank: this one's number; 0 is the one that talks and writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def gather(self, value: T) -> list[T]:
        """What each rank brought, by rank; every rank gets all of it. Values are pickled: tensors on the CPU."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with _failures():
            dist.all_gather_object(values, value)
        return cast(list[T], values)

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, for all; the others make nothing."""
        if self.size == 1:
            return make()
        box = [make() if self.rank == 0 else None]
        with _failures():
            dist.broadcast_object_list(box)
        return cast(T, box[0])


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunFailed(f"another of the processes has ended: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that `torchrun` started, connected while the block runs; one alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
