"""Group normalisation with scale, shift and SiLU in one step, for channel-last feature maps.

What PyTorch offers takes three steps (normalise, scale and shift, SiLU), each of which keeps a copy of the
feature map for the backward pass; and on a CPU its kernel for channel-last maps is slow where they are small.
Here only the input is kept, and what the backward pass needs of the rest is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-5
LARGE = 1024  # positions of a map; from here on PyTorch parallelises over them, and is fast


def group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, silu: bool = False) -> Tensor:
    """Y = act(scale * (x - mean) / sqrt(variance + 1e-5) + shift), act the identity or SiLU.

    Mean and (biased) variance are those of a group of channels over the second dimension (Wu and He, arXiv
    1803.08494; with that dimension the frames of a window, the statistics are those of a pixel over time).

    Args:
        x: (N, R, M, C), contiguous; statistics over R and the C / groups channels of a group, for each N and M.
        scale: (N, C), or (C,) for all N.
        shift: like `scale`.
        groups: number of groups; divides C.
        silu: whether act is SiLU.

    Returns:
        (N, R, M, C).
    """
    scale, shift = (value.view(-1, 1, 1, x.shape[-1]) for value in (scale, shift))
    return _GroupNorm.apply(x, scale, shift, groups, silu)  # type: ignore[no-untyped-call]


def group_norm_of(x: Tensor, scale: Tensor, shift: Tensor, groups: int, counted: Tensor) -> Tensor:
    """As `group_norm` without activation, but with the statistics of a part of what it normalises.

    Args:
        x: (N, R, M, C).
        scale: (C,).
        shift: (C,).
        groups: number of groups; divides C.
        counted: (N, R) bool, what the statistics are taken over; at least one of each row.

    Returns:
        (N, R, M, C).
    """
    grouped = x.view(*x.shape[:-1], groups, -1)  # (N, R, M, G, C / G)
    weight = counted.to(x.dtype) / counted.sum(1, keepdim=True)
    mean = torch.einsum("nr,nrmgc->nmg", weight, grouped)[:, None, :, :, None] / grouped.shape[-1]
    centred = grouped - mean
    variance = torch.einsum("nr,nrmgc->nmg", weight, centred.square())[:, None, :, :, None] / grouped.shape[-1]
    return (centred * torch.rsqrt(variance + EPS)).flatten(-2) * scale + shift


def _over_groups(value: Tensor, groups: int) -> Tensor:
    """The mean of (..., C) over the channels of each group, repeated for each of them."""
    if groups == value.shape[-1]:
        return value
    mean = value.view(*value.shape[:-1], groups, -1).mean(-1, keepdim=True)
    return mean.expand(*mean.shape[:-1], value.shape[-1] // groups).flatten(-2)


def _by_kernel(x: Tensor, scale: Tensor, shift: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's kernel, which is the faster one for large maps: y, and mean and rstd as (N, 1, 1, C)."""
    maps, size, _, channels = x.shape
    shared = len(scale) == len(shift) == 1
    weight, bias = (scale.flatten(), shift.flatten()) if shared else (None, None)
    y, *statistics = torch.native_group_norm(x.permute(0, 3, 1, 2), weight, bias, maps, channels, size, groups, EPS)
    y = y.permute(0, 2, 3, 1)
    mean, rstd = (value.repeat_interleave(channels // groups, dim=1)[:, None, None] for value in statistics)
    return (y if shared else torch.addcmul(shift, y, scale)), mean, rstd


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int, silu: bool) -> Tensor:
        if x.shape[2] == 1 and x.shape[1] >= LARGE:
            y, mean, rstd = _by_kernel(x, scale, shift, groups)
        else:
            mean = _over_groups(x.mean(1, keepdim=True), groups)
            variance = _over_groups(x.square().mean(1, keepdim=True), groups) - mean.square()
            rstd = torch.rsqrt(variance.clamp_(min=0) + EPS)
            slope = scale * rstd
            y = torch.addcmul(shift - mean * slope, x, slope)
        ctx.save_for_backward(x, mean, rstd, scale, shift)
        ctx.groups, ctx.silu = groups, silu
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With n = (x - mean) rstd and z = scale n + shift: dz = act'(z) dy, and as in any normalisation.

        dx = rstd (scale dz - <scale dz> - n <scale dz n>), where <> is the mean over what shares statistics.
        """
        x, mean, rstd, scale, shift = ctx.saved_tensors
        slope = scale * rstd
        dz = dy
        if ctx.silu:
            dz = torch.ops.aten.silu_backward(dy, torch.addcmul(shift - mean * slope, x, slope))
        sum_dz = dz.sum(1, keepdim=True)
        sum_dz_n = ((dz * x).sum(1, keepdim=True) - mean * sum_dz) * rstd
        count = x.shape[1]
        mean_dn = _over_groups(scale * sum_dz, ctx.groups) / count
        mean_dn_n = _over_groups(scale * sum_dz_n, ctx.groups) / count
        # dx = slope dz + a x + b, which spares the normalised map.
        a = -rstd.square() * mean_dn_n
        dx = torch.addcmul(-rstd * mean_dn - a * mean, x, a).addcmul_(dz, slope)
        return dx, sum_dz_n.sum_to_size(scale.shape), sum_dz.sum_to_size(shift.shape), None, None
