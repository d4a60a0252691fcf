"""Group normalisation with scale, shift and SiLU in one step, for channel-last feature maps.

What PyTorch offers takes three steps (normalise, scale and shift, SiLU), each of which keeps a copy of the
feature map for the backward pass; and on a CPU its kernel for channel-last maps is slow where they are small.
Here only the input is kept, and what the backward pass needs of the rest is computed again; that goes for the
normalised map, too, where a linear layer follows.

A map in half precision stays so, as does the result; in between all is computed in the precision of scale and shift.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-5
# Positions of a map from which on PyTorch's forward kernel is the faster one. Its backward kernel is so at 4 x 4 only,
# by a fifth, and gives wrong gradients where a map and its gradient differ in strides.
LARGE = 1024


def group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, silu: bool = False) -> Tensor:
    """Y = act(scale * (x - mean) / sqrt(variance + 1e-5) + shift), act the identity or SiLU.

    Mean and (biased) variance are those of a group of channels over the second dimension (Wu and He, arXiv
    1803.08494; with that dimension the frames of a window, the statistics are those of a pixel over time).

    Args:
        x: (N, R, M, C); statistics over R and the C / groups channels of a group, for each N and M.
        scale: (N, C), or (C,) for all N.
        shift: like `scale`.
        groups: number of groups; divides C.
        silu: whether act is SiLU.

    Returns:
        (N, R, M, C).
    """
    return _group_norm(x, _of_maps(scale), _of_maps(shift), groups, silu)[0]


def group_norm_linear(
    x: Tensor, scale: Tensor, shift: Tensor, groups: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`group_norm` without activation, and a linear map of it for which no copy of it is kept.

    Args:
        x: (N, R, M, C), contiguous.
        scale: (C,).
        shift: (C,).
        groups: number of groups; divides C.
        weight: (D, C).
        bias: (D,).

    Returns:
        The normalised map, (N, R, M, C), and weight @ it + bias, (N, R, M, D).
    """
    scale, shift = _of_maps(scale), _of_maps(shift)
    y, mean, rstd = _group_norm(x, scale, shift, groups, silu=False)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return y, F.linear(y, weight, bias)
    return y, _LinearOfNormed.apply(y, weight, bias, x, mean, rstd, scale, shift)  # type: ignore[no-untyped-call]


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
    grouped = x.to(scale.dtype).view(*x.shape[:-1], groups, -1)  # (N, R, M, G, C / G)
    weight = counted.to(scale.dtype) / counted.sum(1, keepdim=True)
    mean = torch.einsum("nr,nrmgc->nmg", weight, grouped)[:, None, :, :, None] / grouped.shape[-1]
    centred = grouped - mean
    variance = torch.einsum("nr,nrmgc->nmg", weight, centred.square())[:, None, :, :, None] / grouped.shape[-1]
    return ((centred * torch.rsqrt(variance + EPS)).flatten(-2) * scale + shift).to(x.dtype)


def _of_maps(value: Tensor) -> Tensor:
    """(C,) or (N, C) -> (1 or N, 1, 1, C)."""
    return value.view(-1, 1, 1, value.shape[-1])


def _group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised map, and the mean and rstd that it was made with, which are for backward passes only."""
    if torch.compiler.is_compiling():  # it chooses what is kept and what is computed again
        y, mean, rstd = _normalised(x.to(scale.dtype), scale, shift, groups, silu)
        return y.to(x.dtype), mean, rstd
    if torch.is_grad_enabled():
        return _GroupNorm.apply(x, scale, shift, groups, silu)  # type: ignore[no-untyped-call]
    return _forward(x, scale, shift, groups, silu)


def _forward(given: Tensor, scale: Tensor, shift: Tensor, groups: int, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = given.to(scale.dtype)
    # Elsewhere than on a CPU the kernel wants maps with the channels first.
    if x.device.type == "cpu" and x.shape[2] == 1 and x.shape[1] >= LARGE:
        y, mean, rstd = _by_kernel(x, scale, shift, groups)
        y = F.silu(y, inplace=True) if silu else y
    else:
        y, mean, rstd = _normalised(x, scale, shift, groups, silu)
    return y.to(given.dtype), mean, rstd


class _GroupNorm(torch.autograd.Function):
    """Statistics have the shape (N, 1, M, G, 1) throughout, what belongs to channels (N, 1, M, G, C / G)."""

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, scale: Tensor, shift: Tensor, groups: int, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = _forward(given, scale, shift, groups, silu)
        ctx.save_for_backward(given, mean, rstd, scale, shift)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_of_statistics: None) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With n = (x - mean) rstd and z = scale n + shift: dz = act'(z) dy, and as in any normalisation.

        dx = rstd (scale dz - <scale dz> - n <scale dz n>), where <> is the mean over what shares statistics.
        """
        given, mean, rstd, scale, shift = ctx.saved_tensors
        x, dy = given.to(scale.dtype), dy.to(scale.dtype)
        centred, slope = _centred(x, mean), _slope(rstd, scale)
        dz = dy
        if ctx.silu:
            dz = torch.addcmul(shift, centred, slope)
            torch.ops.aten.silu_backward.grad_input(dy, dz, grad_input=dz)
        sum_dz = dz.sum(1, keepdim=True)
        sum_dz_n = _grouped((dz * centred).sum(1, keepdim=True), ctx.groups) * rstd
        dscale, dshift = sum_dz_n.flatten(-2).sum_to_size(scale.shape), sum_dz.sum_to_size(shift.shape)
        factor = _grouped(scale, ctx.groups) / x.shape[1]
        mean_dn = (factor * _grouped(sum_dz, ctx.groups)).mean(-1, keepdim=True)
        mean_dn_n = (factor * sum_dz_n).mean(-1, keepdim=True)
        a, b = _of_channels(-rstd.square() * mean_dn_n, x), _of_channels(-rstd * mean_dn, x)
        dx = torch.addcmul(b, centred, a, out=centred).addcmul_(dz, slope)
        return dx.to(given.dtype), dscale, dshift, None, None


class _LinearOfNormed(torch.autograd.Function):
    """A linear layer that computes its input, a normalised map, again from what that was made of.

    What it was made of gets its gradients by way of the map, not here.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, *made_of: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *made_of)
        return F.linear(y, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        weight, given, mean, rstd, scale, shift = ctx.saved_tensors
        y = torch.addcmul(shift, _centred(given.to(scale.dtype), mean), _slope(rstd, scale)).to(dz.dtype)
        rows = dz.flatten(0, -2)
        dweight = (rows.T @ y.flatten(0, -2)).to(weight.dtype)
        return dz @ weight.to(dz.dtype), dweight, rows.sum(0).to(weight.dtype), *(None for _ in range(5))


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    return x - _of_channels(mean, x)


def _slope(rstd: Tensor, scale: Tensor) -> Tensor:
    return (rstd * _grouped(scale, rstd.shape[-2])).flatten(-2)


def _grouped(value: Tensor, groups: int) -> Tensor:
    return value.view(*value.shape[:-1], groups, -1)


def _group_mean(value: Tensor, groups: int) -> Tensor:
    """The mean of (N, 1, M, C) over the channels of each group."""
    grouped = _grouped(value, groups)
    return grouped if groups == value.shape[-1] else grouped.mean(-1, keepdim=True)


def _of_channels(statistic: Tensor, x: Tensor) -> Tensor:
    """(N, 1, M, G, 1) -> (N, 1, M, C), for each channel its group's."""
    groups, channels = statistic.shape[-2], x.shape[-1]
    return statistic.expand(*statistic.shape[:-1], channels // groups).flatten(-2)


def _normalised(x: Tensor, scale: Tensor, shift: Tensor, groups: int, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: y, mean and rstd."""
    # In two passes: a pixel of a still background hardly varies over time, whatever its mean.
    mean = _group_mean(x.mean(1, keepdim=True), groups)
    y = _centred(x, mean)
    if x.device.type == "cpu" or torch.compiler.is_compiling():
        variance = y.square().mean(1, keepdim=True)
    else:  # without a map of squares: where there is no kernel, there is no memory for it, the check counts on one map
        variance = torch.linalg.vector_norm(y, dim=1, keepdim=True).square() / x.shape[1]
    rstd = _group_mean(variance, groups).add_(EPS).rsqrt_()
    if torch.compiler.is_compiling():
        y = torch.addcmul(shift, y, _slope(rstd, scale))
    else:
        torch.addcmul(shift, y, _slope(rstd, scale), out=y)
    return (F.silu(y, inplace=True) if silu else y), mean, rstd


def _by_kernel(x: Tensor, scale: Tensor, shift: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's kernel, for the sizes at which it is the faster one: y, mean and rstd."""
    maps, size, _, channels = x.shape
    shared = len(scale) == len(shift) == 1
    weight, bias = (scale.flatten(), shift.flatten()) if shared else (None, None)
    y, *statistics = torch.native_group_norm(x.permute(0, 3, 1, 2), weight, bias, maps, channels, size, groups, EPS)
    y = y.permute(0, 2, 3, 1)
    mean, rstd = (value.view(maps, 1, 1, groups, 1) for value in statistics)
    return (y if shared else torch.addcmul(shift, y, scale, out=y)), mean, rstd
