"""Reverse processes: from x_T to x_0 over a chosen list of timesteps, one shared loop.

Every method is a rule for one step from timestep t to the next chosen timestep u < t (or to the clean
data), given x_t and the network's estimate of x_0. With abar the cumulative signal at t, abar' that at u
(abar' = 1 after the last step), and eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar):

* `ancestral` (DDPM, arXiv 2006.11239, eq. 7, with the fixed large variance), beta = 1 - abar / abar':

        x_u = sqrt(abar') beta / (1 - abar) x_0 + sqrt(1 - beta) (1 - abar') / (1 - abar) x_t + sqrt(beta) z

  `posterior-variance` is the same with the small variance beta (1 - abar') / (1 - abar).

* `ddim` (arXiv 2010.02502, eq. 12 and 16), sigma = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar'):

        x_u = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z

  eta = 1 is ancestral sampling with the posterior variance; eta = 0 is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput, did_you_mean

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t, timestep (B,)) -> the network's output
Noise = Callable[[], Tensor]  # standard normal noise of x's shape, fresh at each call


class Step(Protocol):
    """A rule of the reverse process."""

    def __call__(self, x_t: Tensor, x_0: Tensor, abar: float, abar_next: float, noise: Noise) -> Tensor:
        """One step, from cumulative signal abar to abar_next: x_t and the estimate of x_0 -> x_u."""


@dataclass(frozen=True)
class Ancestral:
    """DDPM's reverse step; `large` takes the variance beta, else the posterior's."""

    large: bool = True

    def __call__(self, x_t: Tensor, x_0: Tensor, abar: float, abar_next: float, noise: Noise) -> Tensor:
        """See the module's equations. No noise is added on the way to the clean data."""
        beta = 1 - abar / abar_next
        mean = (abar_next**0.5 * beta * x_0 + (1 - beta) ** 0.5 * (1 - abar_next) * x_t) / (1 - abar)
        if abar_next == 1:
            return mean
        variance = beta if self.large else beta * (1 - abar_next) / (1 - abar)
        return mean + variance**0.5 * noise()


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit model; eta 0 is deterministic, eta 1 is ancestral with the small variance."""

    eta: float = 0.0

    def __call__(self, x_t: Tensor, x_0: Tensor, abar: float, abar_next: float, noise: Noise) -> Tensor:
        """See the module's equations."""
        eps = (x_t - abar**0.5 * x_0) / (1 - abar) ** 0.5
        sigma = self.eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x_u = abar_next**0.5 * x_0 + max(1 - abar_next - sigma**2, 0) ** 0.5 * eps
        return x_u + sigma * noise() if sigma else x_u


DEFAULT_STEPS = {"ancestral": 250, "ddim": 25}


def names() -> list[str]:
    """The samplers that `make` knows."""
    return sorted(DEFAULT_STEPS)


def make(name: str, eta: float = 0.0) -> Step:
    """The sampler of this name. Raises BadInput with the nearest name."""
    if name == "ancestral":
        return Ancestral()
    if name == "ddim":
        return DDIM(eta)
    raise BadInput(f"unknown sampler {name!r}", did_you_mean(name, names()))


def choose_timesteps(total: int, steps: int) -> list[int]:
    """`steps` timesteps out of 0..T-1, evenly, descending, from T-1 (where x_T is pure noise) to 0.

    Raises:
        BadInput: fewer than 1 or more than T steps.
    """
    if not 1 <= steps <= total:
        raise BadInput(f"{steps} sampling steps; the model's process has {total}", f"take 1 to {total}")
    if steps == 1:
        return [total - 1]
    return [round((total - 1) * (steps - 1 - i) / (steps - 1)) for i in range(steps)]


def sample(
    denoise: Denoise,
    process: Process,
    x_T: Tensor,
    timesteps: Sequence[int],
    step: Step,
    noise: Noise,
    clip: bool = True,
) -> Iterator[Tensor]:
    """Runs the reverse process; yields x after every step, the last one is x_0.

    Args:
        denoise: the network with its conditions bound; called once per timestep.
        process: the forward process that the network was trained on.
        x_T: (B, K, C, H, W) standard normal noise.
        timesteps: descending.
        step: the rule, one of `make`.
        noise: gives the step's random numbers.
        clip: the estimate of x_0 is clipped to [-1, 1], the range of the data.
    """
    x = x_T
    for position, t in enumerate(timesteps):
        timestep = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
        x_0 = process.predict_x_0(x, timestep, denoise(x, timestep))
        if clip:
            x_0 = x_0.clamp(-1, 1)
        last = position + 1 == len(timesteps)
        abar = float(process.alphas_cumprod[t])
        abar_next = 1.0 if last else float(process.alphas_cumprod[timesteps[position + 1]])
        x = step(x, x_0, abar, abar_next, noise)
        yield x
