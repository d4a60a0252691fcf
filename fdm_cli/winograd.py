"""3 x 3 convolution with a quarter of the multiplications, for channel-last feature maps on a CPU.

Winograd's minimal filtering F(4 x 4, 3 x 3) (Lavin and Gray, arXiv 1509.09308): a tile of 4 x 4 outputs Y is made of
6 x 6 inputs d and the filter g as

    Y = A^T [(G g G^T) * (B^T d B)] A

with 36 products per tile, channel and filter instead of 144; summed over channels, that is a batch of 36 matrix
products. The transforms pay where there are many channels; PyTorch's kernel is taken elsewhere. On a GPU, cuDNN
does the same by itself.

A, B and G evaluate polynomials at five points and at infinity. The customary points 0, 1, -1, 2, -2 lose a digit;
with 0, 2/3, -2/3, 3/2, -3/2 the result is as exact as that of the direct sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE, TAPS = 4, 3
POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)
TILES_AT_ONCE = 128  # their 36 products stay in the processor's cache
# Below either, the transforms cost more than they save: channels are harmonic, C C' / (C + C').
FEWEST_CHANNELS = 60
FEWEST_CHANNEL_TILES = 30_000  # channels times tiles


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution that keeps the size; the weights are those of any `nn.Conv2d`."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, TAPS, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(F, C, H, W) -> (F, C', H, W)."""
        if not self._worth_it(x):
            return super().forward(x)
        return _Winograd.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]

    def _worth_it(self, x: Tensor) -> bool:
        frames, channels, height, width = x.shape
        harmonic = channels * self.out_channels / (channels + self.out_channels)
        return (
            x.device.type == "cpu"
            and x.dtype == torch.float32
            and harmonic >= FEWEST_CHANNELS
            and height % TILE == width % TILE == 0
            and harmonic * frames * height * width >= FEWEST_CHANNEL_TILES * TILE**2
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """The gradient of the input is a convolution with the filters turned round."""
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = _convolve(dy, weight.flip(2, 3).transpose(0, 1), None) if ctx.needs_input_grad[0] else None
        return dx, _weight_gradient(x, dy), dy.sum(dim=(0, 2, 3))


@cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """A^T (4, 6), G (6, 3), B^T (6, 6): evaluate two polynomials, multiply, interpolate; all of it transposed."""
    matrices = _evaluation(TILE).T, _evaluation(TAPS), _evaluation(TILE + TAPS - 1).inverse().T
    A, G, B = (matrix.float().contiguous() for matrix in matrices)
    return A, G, B


def _evaluation(coefficients: int) -> Tensor:
    """(6, n): from the coefficients of a polynomial to its values at the points; at infinity, the last of them."""
    powers = torch.tensor(POINTS, dtype=torch.float64)[:, None] ** torch.arange(coefficients)
    return torch.cat([powers, torch.eye(coefficients, dtype=torch.float64)[-1:]])


def _both_sides(matrix: Tensor, tiles: Tensor) -> Tensor:
    """M t M^T for every t: (r, c) and (c, c, ...) -> (r, r, ...)."""
    rows, columns = matrix.shape
    left = torch.mm(matrix, tiles.reshape(columns, -1))
    both = torch.bmm(matrix.expand(rows, rows, columns), left.view(rows, columns, -1))
    return both.view(rows, rows, *tiles.shape[2:])


def _chunks(x: Tensor) -> Iterator[slice]:
    """So many frames of (F, C, H, W) at once that their tiles are about TILES_AT_ONCE."""
    frames, _, height, width = x.shape
    step = max(1, TILES_AT_ONCE * TILE**2 // (height * width))
    # Of a tensor without content, whose memory is counted, the first chunk stands for all.
    for start in range(0, frames if type(x) is Tensor else 1, step):
        yield slice(start, min(start + step, frames))


class _InputTiles:
    """The 6 x 6 tiles of padded feature maps, B^T d B, a chunk at a time: (6, 6, N, C) of N tiles."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.permute(0, 2, 3, 1)
        most = next(_chunks(x)).stop
        _, height, width, channels = self.x.shape
        self.padded = x.new_zeros(most, height + 2, width + 2, channels)  # its border stays zero

    def __call__(self, chunk: slice) -> Tensor:
        x = self.x[chunk]
        frames, height, width, channels = x.shape
        self.padded[:frames, 1:-1, 1:-1] = x
        frame, row, column, channel = self.padded.stride()
        tiles = self.padded.as_strided(
            (TILE + 2, TILE + 2, frames, height // TILE, width // TILE, channels),
            (row, column, frame, TILE * row, TILE * column, channel),
        )
        return _both_sides(_matrices()[2], tiles.reshape(TILE + 2, TILE + 2, -1, channels))


def _output_tiles(y: Tensor) -> Tensor:
    """The 4 x 4 tiles of (F, C, H, W), as a view: (4, 4, F, H / 4, W / 4, C)."""
    frames, channels, height, width = y.shape
    tiles = y.permute(0, 2, 3, 1).view(frames, height // TILE, TILE, width // TILE, TILE, channels)
    return tiles.permute(2, 4, 0, 1, 3, 5)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(F, C, H, W) channels_last and (C', C, 3, 3) -> (F, C', H, W) channels_last."""
    A, G, _ = _matrices()
    frames, _, height, width = x.shape
    filters = _both_sides(G, weight.permute(2, 3, 0, 1).contiguous()).flatten(0, 1).transpose(1, 2)  # (36, C, C')
    channels = len(weight)
    y = x.new_empty_strided(
        (frames, channels, height, width), (height * width * channels, 1, width * channels, channels)
    )
    tiles_of = _InputTiles(x)
    for chunk in _chunks(x):
        products = torch.bmm(tiles_of(chunk).flatten(0, 1), filters)
        tiles = _both_sides(A, products.view(TILE + 2, TILE + 2, *products.shape[1:]))
        if bias is not None:
            tiles += bias
        out = _output_tiles(y[chunk])
        out.copy_(tiles.view(out.shape))
    return y


def _weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """(F, C, H, W) and (F, C', H, W), channels_last -> (C', C, 3, 3)."""
    A, G, _ = _matrices()
    channels, out_channels = x.shape[1], dy.shape[1]
    dU = x.new_zeros((TILE + 2) ** 2, channels, out_channels)
    tiles_of = _InputTiles(x)
    for chunk in _chunks(x):
        outputs = _output_tiles(dy[chunk]).reshape(TILE, TILE, -1, out_channels)
        dU.baddbmm_(tiles_of(chunk).flatten(0, 1).transpose(1, 2), _both_sides(A.T, outputs).flatten(0, 1))
    dw = _both_sides(G.T, dU.view(TILE + 2, TILE + 2, channels, out_channels))
    return dw.permute(3, 2, 0, 1)
