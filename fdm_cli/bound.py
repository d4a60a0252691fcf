"""The variational bound on the negative log-likelihood of latent frames given observed ones, in bits per dimension.

Conventions are those of DDPM (arXiv 2006.11239, eq. 5 and 13) and Improved DDPM (arXiv 2102.09672, section 2), which
the authors of FDM follow. For chosen timesteps t_1 < ... < t_n, with abar_i the cumulative signal at t_i and
abar_0 = 1, the process that visits only those has beta_i = 1 - abar_i / abar_(i-1) (arXiv 2102.09672, section 4), and

    L = KL(q(x_n | x_0) || N(0, I)) + sum_(i>1) KL(q(x_(i-1) | x_i, x_0) || p(x_(i-1) | x_i)) - log p(x_0 | x_1)

* q(x_(i-1) | x_i, x_0) = N(c x_0 + c' x_i, v_i I), v_i = beta_i (1 - abar_(i-1)) / (1 - abar_i): the posterior.
* p(x_(i-1) | x_i) = N(c x^_0 + c' x_i, s_i I), x^_0 the network's estimate, clipped to [-1, 1]. The variance is that
  of the ancestral sampler, s_i = beta_i; at i = 1 it is s_1 = v_2, since v_1 is 0.
* p(x_0 | x_1): that Gaussian's mass on the pixel's own one of 256 bins, 2/255 wide, the outer ones open.
* Each term is divided by the number of latent values and by ln 2. Observed frames enter clean and are not counted.
  Terms are estimated with one noise each.

A bound at fewer timesteps is a bound of another, coarser process: compare only figures of equal n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput

LEAST_LOG = 1e-12  # a bin's mass is not taken for less


@dataclass(frozen=True)
class Respaced:
    """The process that visits only some timesteps, as the module's docstring has it.

    Videos are in [-1, 1], x_t is as the process makes it.

    Attributes:
        process: the whole one.
        timesteps: t_1 < ... < t_n of the whole process, n at least 2.
        abar, abar_before: (n,) float64, abar_i and abar_(i-1).
        beta, posterior, variance: (n,) float64, beta_i, v_i and s_i.
    """

    process: Process
    timesteps: tuple[int, ...]
    abar: Tensor
    abar_before: Tensor
    beta: Tensor
    posterior: Tensor
    variance: Tensor

    @staticmethod
    def of(process: Process, timesteps: Sequence[int]) -> Respaced:
        """For timesteps in any order. Raises BadInput for fewer than two."""
        chosen = sorted(set(timesteps))
        if len(chosen) < 2:
            raise BadInput("the bound needs at least 2 timesteps", f"take 2 to {process.timesteps}")
        abar = process.alphas_cumprod[chosen]
        abar_before = torch.cat([abar.new_ones(1), abar[:-1]])
        beta = 1 - abar / abar_before
        posterior = beta * (1 - abar_before) / (1 - abar)
        variance = torch.cat([posterior[1:2], beta[1:]])
        return Respaced(process, tuple(chosen), abar, abar_before, beta, posterior, variance)

    def term(self, i: int, x_0: Tensor, x_t: Tensor, estimate: Tensor) -> Tensor:
        """Nats of the i-th term (counted from 0, the decoder's) for each value; all float64 of one shape."""
        abar, before, beta = (float(values[i]) for values in (self.abar, self.abar_before, self.beta))
        signal = before**0.5 * beta / (1 - abar)
        rest = (1 - beta) ** 0.5 * (1 - before) / (1 - abar)
        mean = signal * self.process.normalised(estimate.clamp(-1, 1)) + rest * x_t
        if i == 0:
            deviation = float(self.variance[0]) ** 0.5 * self.process.config.data_std
            return -discretized_log_likelihood(x_0, self.process.restored(mean), deviation)
        return normal_kl(
            signal * self.process.normalised(x_0) + rest * x_t, float(self.posterior[i]), mean, float(self.variance[i])
        )

    def prior(self, x_0: Tensor) -> Tensor:
        """Nats of KL(q(x_n | x_0) || N(0, I)) for each value."""
        abar = float(self.abar[-1])
        return normal_kl(abar**0.5 * self.process.normalised(x_0), 1 - abar, torch.zeros_like(x_0), 1.0)


def normal_kl(mean: Tensor, variance: float, other_mean: Tensor, other_variance: float) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)) in nats, for each value."""
    ratio = variance / other_variance
    return 0.5 * (ratio - 1 - math.log(ratio) + (mean - other_mean).square() / other_variance)


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, deviation: float) -> Tensor:
    """Log of a Gaussian's mass on each value's bin, in nats; 256 values from -1 to 1 (DDPM, eq. 13)."""
    above = torch.special.ndtr((x_0 + 1 / 255 - mean) / deviation)
    below = torch.special.ndtr((x_0 - 1 / 255 - mean) / deviation)
    above = torch.where(x_0 > 0.999, torch.ones_like(above), above)
    below = torch.where(x_0 < -0.999, torch.zeros_like(below), below)
    return (above - below).clamp(min=LEAST_LOG).log()
