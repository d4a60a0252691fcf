"""What is measured of frames: closeness to others (PSNR, SSIM) and what they look like by themselves.

Frames here are (..., C, H, W), float32 in [0, 1]; a measure gives one number a frame, (...). Model frames are brought
there by `unit`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
BLACK, DARK, BRIGHT = 0.1, 0.25, 0.75  # see `grey_share`
CHANGE = 0.1  # see `changed_share`
LOOKED_AT, PIECE, APART = 32, 10, 4  # pixels, see `kept_share`
AT_ONCE = 64  # frames


def unit(frames: Tensor) -> Tensor:
    """Frames of the model, in [-1, 1], as they are measured: in [0, 1], and what lies outside is clipped."""
    return (frames.float() / 2 + 0.5).clamp(0, 1)


def squared_error(frames: Tensor, true: Tensor) -> Tensor:
    """Mean squared error of each frame, (...)."""
    return (frames - true).square().mean(dim=(-3, -2, -1))


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error in [0, 1]: -10 log10(error); inf of no error.

    The error is to be averaged over all clips first. The mean of the clips' own ratios is another, larger figure (the
    logarithm is concave), in which a few easy clips count most.
    """
    return -10 * math.log10(error) if error > 0 else math.inf


def ssim(frames: Tensor, true: Tensor) -> Tensor:
    """Structural similarity of each frame, (...): Wang et al. 2004, with the constants of that paper.

    Means, variances and covariance are weighted by a Gaussian window of 11 x 11 pixels, sigma 1.5, K_1 = 0.01,
    K_2 = 0.03, L = 1; the map is averaged over the places where the window lies within the frame, and over channels.

    Raises:
        ValueError: frames smaller than the window.
    """
    if min(frames.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW} pixels, not {tuple(frames.shape[-2:])}")
    x, y = (tensor.double().flatten(0, -3)[:, None] for tensor in (frames, true.expand_as(frames)))
    place = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-place.square() / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2
    cov = mean(x * y) - mu_x * mu_y
    c_1, c_2 = 0.01**2, 0.03**2
    similarity = (2 * mu_x * mu_y + c_1) * (2 * cov + c_2) / ((mu_x**2 + mu_y**2 + c_1) * (var_x + var_y + c_2))
    return similarity.mean(dim=(1, 2, 3)).view(frames.shape[:-2]).mean(-1).float()


def sharpness(frames: Tensor) -> Tensor:
    """Gradient energy of each frame, (...): mean squared difference of neighbouring pixels, across plus down.

    Squared, because the mean absolute difference does not see a blurred edge: its many small steps add up to the
    same height.
    """
    across, down = frames.diff(dim=-1).square(), frames.diff(dim=-2).square()
    return across.mean(dim=(-3, -2, -1)) + down.mean(dim=(-3, -2, -1))


def ink(frames: Tensor) -> Tensor:
    """Mean pixel of each frame, (...)."""
    return frames.mean(dim=(-3, -2, -1))


def grey_share(frames: Tensor) -> Tensor:
    """Of each frame's pixels above 0.1, the share between 0.25 and 0.75, (...); NaN of a frame without any.

    Pixels of colour frames count by the mean of their channels. Digits are mostly bright; washed-out ones are grey.
    """
    brightness = frames.mean(-3)
    visible = (brightness > BLACK).sum(dim=(-2, -1))
    grey = ((brightness >= DARK) & (brightness <= BRIGHT)).sum(dim=(-2, -1))
    return grey / visible  # 0 / 0 is NaN


def changed_share(frames: Tensor, before: Tensor) -> Tensor:
    """The share of each frame's pixels that differ by more than 0.1 from the frame before, (...): motion."""
    return ((frames - before).abs().mean(-3) > CHANGE).float().mean(dim=(-2, -1))


def kept_share(frames: Tensor, before: Tensor) -> Tensor:
    """How much of each frame can be put together from pieces of an earlier one, (n,): 1 is all, wherever it has gone.

    Pieces are squares of 10 x 10 pixels, one every 4, of frames averaged down to 32 x 32. Each is compared with all
    squares within the earlier frame; the least squared errors are summed up and divided by what they would be were the
    pieces as bright as their frame is on average. At least 0; NaN of a frame that is one grey.

    Something always fits by chance: of two clips of other digits, more than half as much is kept as in one clip. So
    the figure says something beside that of real clips.

    Args:
        frames: (n, C, H, W).
        before: an earlier frame for each.
    """
    height, width = (min(side, LOOKED_AT) for side in frames.shape[-2:])
    small = [F.adaptive_avg_pool2d(tensor, (height, width)) for tensor in (frames, before)]
    parts = (_kept(frames, before) for frames, before in zip(*(torch.split(x, AT_ONCE) for x in small), strict=True))
    return torch.cat(list(parts))


def _kept(frames: Tensor, before: Tensor) -> Tensor:
    size = min(PIECE, *frames.shape[-2:])
    pieces, others = F.unfold(frames, size, stride=APART).mT, F.unfold(before, size).mT  # (n, pieces, C size^2)
    errors = pieces.square().sum(-1, keepdim=True) + others.square().sum(-1)[:, None] - 2 * pieces @ others.mT
    best = errors.amin(-1).clamp(min=0).sum(-1)  # rounded, a perfect one could be less than nothing
    grey = (pieces - frames.mean(dim=(1, 2, 3))[:, None, None]).square().sum(dim=(-2, -1))
    return torch.where(grey > 1e-9, 1 - best / grey, math.nan).clamp(min=0)
