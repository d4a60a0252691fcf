"""The discrete diffusion process: betas, q(x_t | x_0), parameterizations, the loss on latent frames.

Symbols as in DDPM (arXiv 2006.11239): beta_t, abar_t = prod_{s<=t} (1 - beta_s), timesteps 0..T-1.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fdm_cli.config import DiffusionConfig


def make_betas(schedule: str, timesteps: int) -> Tensor:
    """beta_t as (T,) float64.

    linear: 1e-4 .. 0.02 (DDPM), scaled by 1000 / T so that abar_T-1 hardly depends on T;
    cosine: abar(s) = cos^2((s + 0.008) / 1.008 * pi / 2), betas at most 0.999 (arXiv 2102.09672, eq. 17).
    """
    if schedule == "linear":
        scale = 1000 / timesteps
        return torch.linspace(scale * 1e-4, min(scale * 0.02, 0.999), timesteps, dtype=torch.float64)
    s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    abar = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def shifted(way: float, shift: float) -> float:
    """A part of the way to pure noise, 0 to 1, moved towards it: k u / (1 + (k - 1) u) (arXiv 2403.03206, eq. 23)."""
    return shift * way / (1 + (shift - 1) * way)


def normalised(video: Tensor, config: DiffusionConfig) -> Tensor:
    """A video in [-1, 1] as the process and the network see it: of mean 0 and standard deviation 1."""
    return (video - config.data_mean) / config.data_std if _normalises(config) else video


def _normalises(config: DiffusionConfig) -> bool:
    return (config.data_mean, config.data_std) != (0, 1)


class Process:
    """The forward process and the conversions between what a network predicts and x_0, eps.

    With a = sqrt(abar_t) and s = sqrt(1 - abar_t):

        x_t = a x_0 + s eps                      (DDPM, eq. 4)
        v   = a eps - s x_0                      (arXiv 2202.00512, appendix D)

    In these x_0 is the `normalised` video, of mean 0 and standard deviation 1 where the configuration tells the data's:
    then x_t has them at every timestep, and v is not correlated with x_t, so that the network need not pass on what
    it is given (compare arXiv 2206.00364, section 5). x_0 is in [-1, 1] wherever it is
    an argument or a result; x_t and what the network predicts belong to the `normalised` video.

    Attributes:
        timesteps: T.
        parameterization: what the network predicts: `eps`, `v` or `x_0`.
        betas, alphas_cumprod: (T,) float64, on the CPU.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.timesteps = config.timesteps
        self.parameterization = config.parameterization
        self.config = config
        with torch.device("cpu"):  # wherever a network is made
            self.betas = make_betas(config.betas, config.timesteps)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self._on: dict[torch.device, Tensor] = {}

    def normalised(self, video: Tensor) -> Tensor:
        """See the function of this name."""
        return normalised(video, self.config)

    def restored(self, video: Tensor) -> Tensor:
        """Undoes `normalised`."""
        return video * self.config.data_std + self.config.data_mean if _normalises(self.config) else video

    def _alphas_cumprod(self, timestep: Tensor) -> Tensor:
        """The abar of timesteps (B,), float64, on their device, which then need not wait for the CPU."""
        device = torch.device("cpu") if timestep.device.type == "mps" else timestep.device  # no float64
        if device not in self._on:
            self._on[device] = self.alphas_cumprod.to(device)
        return self._on[device][timestep.to(device)]

    def _signal_and_noise(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) for a timestep per clip, shaped (B, 1, 1, 1, 1), in `like`'s type and device."""
        abar = self._alphas_cumprod(timestep)
        shape = (-1,) + (1,) * (like.dim() - 1)
        a, s = abar.sqrt().view(shape), (1 - abar).sqrt().view(shape)
        return a.to(like), s.to(like)

    def q_sample(self, x_0: Tensor, timestep: Tensor, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) for given noise; videos (B, K, C, H, W), timestep (B,)."""
        a, s = self._signal_and_noise(timestep, x_0)
        return a * self.normalised(x_0) + s * eps

    def target(self, x_0: Tensor, timestep: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict, in its parameterization."""
        if self.parameterization == "eps":
            return eps
        x_0 = self.normalised(x_0)
        if self.parameterization == "x_0":
            return x_0
        a, s = self._signal_and_noise(timestep, x_0)
        return a * eps - s * x_0

    def predict_x_0(self, x_t: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """x_0 from the network's output."""
        if self.parameterization == "x_0":
            return self.restored(output)
        a, s = self._signal_and_noise(timestep, x_t)
        if self.parameterization == "eps":
            return self.restored((x_t - s * output) / a)
        return self.restored(a * x_t - s * output)

    def output_for(self, x_t: Tensor, timestep: Tensor, x_0: Tensor) -> Tensor:
        """The network's output of which `predict_x_0` makes this x_0."""
        x_0 = self.normalised(x_0)
        if self.parameterization == "x_0":
            return x_0
        a, s = self._signal_and_noise(timestep, x_t)
        if self.parameterization == "eps":
            return (x_t - a * x_0) / s
        return (a * x_t - x_0) / s

    def loss_weight(self, weighting: Literal["min-snr", "x_0"], timestep: Tensor) -> Tensor:
        """(B,) weights of the loss for timesteps (B,), whatever the network predicts.

        The error in x_0 counts the same at every timestep (`x_0`), or min(SNR, 5) times (`min-snr`: arXiv
        2303.09556, section 3.4), SNR = abar / (1 - abar). The same error seen in eps is SNR times as large, in v
        SNR + 1 times, so there the weight is divided by that. Where x_t is mostly noise only the observed frames tell
        what x_0 is: `x_0` counts that most, `min-snr` least.
        """
        abar = self._alphas_cumprod(timestep)
        snr = abar / (1 - abar)
        unit = {"x_0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[self.parameterization]
        weight = snr.clamp(max=5) if weighting == "min-snr" else torch.ones_like(snr)
        return (weight / unit).to(timestep.device, torch.float32)

    def loss(self, x_0: Tensor, timestep: Tensor, eps: Tensor, output: Tensor, latent: Tensor) -> Tensor:
        """(B,) squared error per clip, averaged over that clip's own latent elements (FDM, eq. 4).

        Args:
            x_0: (B, K, C, H, W), clean.
            eps: the noise that made x_t, like x_0.
            output: of the network, like x_0.
            timestep: (B,) int64.
            latent: (B, K) bool; values of `output` on other frames do not matter.
        """
        error = output - self.target(x_0, timestep, eps)
        error = torch.where(latent[:, :, None, None, None], error, 0).square().mean(dim=(2, 3, 4))
        return error.sum(1) / latent.sum(1)
