"""The discrete diffusion process a second time, plainly and in float32.

Words: x_0 clean videos, x_t noisy ones, eps the noise in them; timesteps count 0..T-1.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class OracleProcess:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) and its ancestral reversal (DDPM, arXiv 2006.11239).

    beta_t runs linearly from 1e-4 * 1000 / T to 0.02 * 1000 / T, and abar_t is the product of 1 - beta up to t.
    """

    def __init__(self, num_timesteps: int = 1000) -> None:
        scale = 1000 / num_timesteps
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        self.num_timesteps = num_timesteps
        self.betas = betas.float()
        self.alphas_cumprod = alphas_cumprod.float()
        self.signal = alphas_cumprod.sqrt().float()
        self.noise = (1 - alphas_cumprod).sqrt().float()
        self.weight_x_0 = (betas * previous.sqrt() / (1 - alphas_cumprod)).float()
        self.weight_x_t = ((1 - betas).sqrt() * (1 - previous) / (1 - alphas_cumprod)).float()

    def q_sample(self, x_0: Tensor, timestep: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; (B, K, C, H, W) and (B,)."""
        return _per_clip(self.signal, timestep) * x_0 + _per_clip(self.noise, timestep) * eps

    def predict_x_0(self, x_t: Tensor, timestep: Tensor, eps: Tensor) -> Tensor:
        """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), clipped to [-1, 1]."""
        x_0 = (x_t - _per_clip(self.noise, timestep) * eps) / _per_clip(self.signal, timestep)
        return x_0.clamp(-1, 1)

    def posterior_mean(self, x_0: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0), with abar_{-1} = 1.

        beta_t sqrt(abar_{t-1}) / (1 - abar_t) x_0 + sqrt(1 - beta_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
        """
        return _per_clip(self.weight_x_0, timestep) * x_0 + _per_clip(self.weight_x_t, timestep) * x_t

    def step(self, x_t: Tensor, timestep: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
        """x_{t-1} = posterior mean + sqrt(beta_t) noise ("fixed large"), without the noise at timestep 0."""
        mean = self.posterior_mean(self.predict_x_0(x_t, timestep, eps), x_t, timestep)
        std = _per_clip(self.betas.sqrt(), timestep) * _per_clip(torch.arange(self.num_timesteps) > 0, timestep)
        return mean + std * noise

    def chain(self, x_T: Tensor, noises: Sequence[Tensor], predict_eps: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """From timestep T-1 down to 0; `noises[i]` is the i-th step's, `predict_eps` takes x_t and timestep."""
        x_t = x_T
        for t, noise in zip(reversed(range(self.num_timesteps)), noises, strict=True):
            timestep = torch.full((len(x_t),), t)
            x_t = self.step(x_t, timestep, predict_eps(x_t, timestep), noise)
        return x_t


def _per_clip(values: Tensor, timestep: Tensor) -> Tensor:
    """values[timestep], shaped to multiply (B, K, C, H, W)."""
    return values[timestep][:, None, None, None, None]
