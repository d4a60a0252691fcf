"""Dropout that draws 16 random bits a number instead of a word, and keeps one byte a number for the backward pass.

On a CPU PyTorch's own takes longer than the convolution beside it where there are few channels, and keeps four.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """Sets numbers to zero with probability p, to within 2^-17, and scales the others up (arXiv 1207.0580)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, in memory without gaps or repeats; draws from torch's global generator while training."""
        dropped = round(self.p * LEVELS)
        if not self.training or dropped == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        words = x.new_empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()]
        # In the order of memory, whatever the layout of x is.
        keep = (bits >= dropped - LEVELS // 2).as_strided(x.shape, x.stride())
        return _Mask.apply(x, keep, LEVELS / (LEVELS - dropped))  # type: ignore[no-untyped-call]


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (dy * keep).mul_(ctx.scale), None, None
