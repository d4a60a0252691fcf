"""The blocks of the network that work on each frame by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdm_cli.attention import GROUPS, Relative, TemporalAttention, affine, zero_
from fdm_cli.dropout import Dropout
from fdm_cli.group_norm import group_norm
from fdm_cli.window import Window
from fdm_cli.winograd import Conv3x3


@dataclass(frozen=True)
class Conditions:
    """What every block may look at.

    Attributes:
        activated: (B, E) SiLU of the timestep embedding, for the residual blocks.
        relative: for each temporal attention, what it knows of pairs of frames.
        window: the frames of the call.
        clip_of_frame: (F,) int64, the clip that each frame that is still computed belongs to.
    """

    activated: Tensor
    relative: Mapping[TemporalAttention, Relative]
    window: Window
    clip_of_frame: Tensor


def norm_silu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU(scale * GroupNorm(x) + shift) of (F, C, H, W); scale and shift (F, C), or (C,) for all frames."""
    frames, channels, height, width = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(frames, height * width, 1, channels)  # a view of channels_last memory
    tokens = group_norm(tokens, scale, shift, GROUPS, silu=True)
    return tokens.view(frames, height, width, channels).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-conv, timestep scale and shift on the second GroupNorm, SiLU-dropout-conv, skip."""

    def __init__(self, channels: int, out_channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), Conv3x3(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        last = Conv3x3(out_channels, out_channels)
        zero_(last)
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out_channels), nn.SiLU(), Dropout(dropout), last)
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(F, C, H, W) -> (F, C', H, W)."""
        _, _, first_conv = self.in_layers
        _, _, dropout, second_conv = self.out_layers
        h = first_conv(norm_silu(x, *affine(self.in_layers[0])))
        weight, bias = affine(self.out_layers[0])
        scale, shift = self.emb_layers[1](conditions.activated).chunk(2, dim=1)
        scale, shift = weight * (1 + scale), bias * (1 + scale) + shift
        # Not by indexing: the sum in its backward pass depends on how threads meet.
        of_frame = (value.index_select(0, conditions.clip_of_frame) for value in (scale, shift))
        h = norm_silu(h, *of_frame)
        return second_conv(dropout(h)).add_(self.skip_connection(x))


class Positions(nn.Module):
    """Adds a learned vector for each position, which tells the network where in the frame it is.

    Not in FDM's network, whose spatial attention knows of places only what zero padding lets convolutions guess.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(channels, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """(F, C, H, W) -> the same."""
        return x + self.embedding.to(x.dtype)  # the map's own under autocast, or all that follows would be fp32


class Downsample(nn.Module):
    """Halves height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(F, C, H, W) -> (F, C, H / 2, W / 2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3 x 3 convolution.

    Of the nine pixels under the filter, those that are copies of one another get the sum of their weights: every
    output pixel needs 2 x 2 pixels of the small map, a filter of its own for each of the four places that it can
    have over a small pixel. That is the same result for 16 (H + 1) (W + 1) products a channel and filter, not 36 H W.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(F, C, H, W) -> (F, C, 2 H, 2 W)."""
        height, width = x.shape[2:]
        filters = _of_places(_of_places(self.conv.weight.permute(0, 2, 3, 1), 1), 2)  # (O, 4, 4, C)
        filters = filters.view(-1, 2, 2, 2, 2, filters.shape[-1]).permute(1, 3, 0, 5, 2, 4).flatten(0, 2)
        bias = None if self.conv.bias is None else self.conv.bias.repeat(4)
        # One row and column more than the small map has: what lies between its pixels, and at its borders.
        between = F.conv2d(x, filters.contiguous(memory_format=torch.channels_last), bias, padding=1)
        between = between.permute(0, 2, 3, 1).view(-1, height + 1, width + 1, 2, 2, x.shape[1])  # row's, column's place
        rows = []
        for a in range(2):
            places = [between[:, a : a + height, b : b + width, a, b] for b in range(2)]
            rows.append(torch.stack(places, dim=3))  # (F, H, W, 2, C)
        return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _of_places(weight: Tensor, dimension: int) -> Tensor:
    """Three taps of a filter as those of the two small pixels: two of even places, then two of odd ones."""
    first, second, third = weight.unbind(dimension)
    return torch.stack([first, second + third, first + second, third], dimension)
