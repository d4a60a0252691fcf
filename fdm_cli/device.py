"""The device that a command computes on."""

from __future__ import annotations

import torch

from fdm_cli.errors import BadInput


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `mps`; sets the number of CPU threads when given.

    Raises:
        BadInput: the device is not there.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        raise BadInput(f"no {name} device here", "use --device cpu")
    return torch.device(name)
