"""Random numbers that belong to a thing (a clip, a sample, a stage), not to the moment they are drawn.

Every draw comes from a generator that is derived from the seed and from what the draw is for, so that
batch size, order of work, number of devices and resumption change nothing.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as `(seed, "clip", 17)`; equal keys give equal seeds on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for this key. Draw on the CPU and move: the numbers do not depend on the device then."""
    return torch.Generator().manual_seed(derive_seed(*key))
