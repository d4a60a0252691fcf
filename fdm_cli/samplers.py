"""Reverse processes: from x_T to x_0 over a chosen list of timesteps, one shared loop.

Every method is a rule for one step from timestep t to the next chosen timestep u < t (or to the clean
data), given x_t and the network's estimate of x_0. With abar the cumulative signal at t, abar' that at u
(abar' = 1 after the last step), and eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar):

* `ancestral` (DDPM, arXiv 2006.11239, eq. 7, with the fixed large variance), beta = 1 - abar / abar':

        x_u = sqrt(abar') beta / (1 - abar) x_0 + sqrt(1 - beta) (1 - abar') / (1 - abar) x_t + sqrt(beta) z

  With the small variance, the posterior's, beta (1 - abar') / (1 - abar), it is `ddim` with eta = 1.

* `ddim` (arXiv 2010.02502, eq. 12 and 16), sigma = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar'):

        x_u = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z

  eta = 1 is ancestral sampling with the posterior variance; eta = 0 is deterministic.

* `dpm-solver++` (the multistep 2M of arXiv 2211.01095, algorithm 2), deterministic and of second order. With
  lambda = log(abar / (1 - abar)) / 2, h = lambda' - lambda, and x_0^, lambda^ those of the step before:

        r = (lambda - lambda^) / h,   D = (1 + 1 / (2 r)) x_0 - 1 / (2 r) x_0^
        x_u = sqrt((1 - abar') / (1 - abar)) x_t - sqrt(abar') (exp(-h) - 1) D

  The first step, and the last one (h is infinite), take D = x_0, which is DDIM with eta 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fdm_cli.diffusion import Process, shifted
from fdm_cli.errors import BadInput, did_you_mean

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t, timestep (B,)) -> the network's output
Noise = Callable[[], Tensor]  # standard normal noise of x's shape, fresh at each call


@dataclass(frozen=True)
class Estimate:
    """What a step starts from.

    Attributes:
        x_t: the noisy video.
        x_0: the network's estimate of the clean one.
        abar: the cumulative signal at this timestep.
        before: the estimate one step earlier; None at the first step.
    """

    x_t: Tensor
    x_0: Tensor
    abar: float
    before: Estimate | None = None

    @property
    def log_snr(self) -> float:
        """lambda, half the logarithm of the ratio of signal to noise."""
        return 0.5 * math.log(self.abar / (1 - self.abar))


class Step(Protocol):
    """A rule of the reverse process."""

    def __call__(self, now: Estimate, abar_next: float, noise: Noise) -> Tensor:
        """One step to the cumulative signal abar_next, which is 1 for the clean data: x_u."""


@dataclass(frozen=True)
class Ancestral:
    """DDPM's reverse step; `large` takes the variance beta, else the posterior's."""

    large: bool = True

    def __call__(self, now: Estimate, abar_next: float, noise: Noise) -> Tensor:
        """See the module's equations. No noise is added on the way to the clean data."""
        beta = 1 - now.abar / abar_next
        mean = (abar_next**0.5 * beta * now.x_0 + (1 - beta) ** 0.5 * (1 - abar_next) * now.x_t) / (1 - now.abar)
        if abar_next == 1:
            return mean
        variance = beta if self.large else beta * (1 - abar_next) / (1 - now.abar)
        return mean + variance**0.5 * noise()


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit model; eta 0 is deterministic, eta 1 is ancestral with the small variance."""

    eta: float = 0.0

    def __call__(self, now: Estimate, abar_next: float, noise: Noise) -> Tensor:
        """See the module's equations."""
        eps = (now.x_t - now.abar**0.5 * now.x_0) / (1 - now.abar) ** 0.5
        sigma = self.eta * ((1 - abar_next) / (1 - now.abar) * (1 - now.abar / abar_next)) ** 0.5
        x_u = abar_next**0.5 * now.x_0 + max(1 - abar_next - sigma**2, 0) ** 0.5 * eps
        return x_u + sigma * noise() if sigma else x_u


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++(2M); with `order` 1 it is DDIM with eta 0."""

    order: int = 2

    def __call__(self, now: Estimate, abar_next: float, noise: Noise) -> Tensor:  # noqa: ARG002  (deterministic)
        """See the module's equations."""
        if abar_next == 1:
            return now.x_0
        h = 0.5 * math.log(abar_next / (1 - abar_next)) - now.log_snr
        estimate = now.x_0
        if self.order == 2 and now.before is not None:
            half = 0.5 * h / (now.log_snr - now.before.log_snr)
            estimate = (1 + half) * now.x_0 - half * now.before.x_0
        scale = ((1 - abar_next) / (1 - now.abar)) ** 0.5
        return scale * now.x_t - abar_next**0.5 * math.expm1(-h) * estimate


DEFAULT_STEPS = {"ancestral": 250, "ddim": 25, "dpm-solver++": 15}


def make(name: str, eta: float = 0.0) -> Step:
    """The sampler of this name.

    Args:
        name: a key of DEFAULT_STEPS.
        eta: of DDIM, 0 to 1; of any other method 0.

    Raises:
        BadInput: unknown name, with the nearest one; an eta that the method does not have.
    """
    if eta and name != "ddim" and name in DEFAULT_STEPS:
        raise BadInput(f"--eta {eta:g} is for ddim, {name} has none", "--sampler ddim")
    if name == "ancestral":
        return Ancestral()
    if name == "ddim":
        return DDIM(eta)
    if name == "dpm-solver++":
        return DPMSolver()
    raise BadInput(f"unknown sampler {name!r}", did_you_mean(name, DEFAULT_STEPS))


LAST = 0.02  # of the way to pure noise, see `choose_timesteps`


def choose_timesteps(total: int, steps: int, shift: float = 1.0) -> list[int]:
    """`steps` timesteps out of 0..T-1, descending, from T-1, where x_T is pure noise.

    Evenly down to 0; or `diffusion.shifted` down to LAST, because a long step that ends with less noise makes what it
    extrapolates too bright.

    Args:
        total: T.
        steps: how many.
        shift: above 1 takes more of them where there is much noise; 1 is even.

    Raises:
        BadInput: fewer than 1 or more than T steps.
    """
    if not 1 <= steps <= total:
        raise BadInput(f"{steps} sampling steps; the model's process has {total}", f"take 1 to {total}")
    if steps == 1:
        return [total - 1]
    if shift == 1:
        return [round((total - 1) * after / (steps - 1)) for after in reversed(range(steps))]
    timesteps = [total]
    for after in reversed(range(steps)):  # calls that come after this one, each at another timestep
        way = LAST + (1 - LAST) * shifted(after / (steps - 1), shift)
        timesteps.append(min(timesteps[-1] - 1, max(after, round((total - 1) * way))))
    return timesteps[1:]


def sample(
    denoise: Denoise,
    process: Process,
    x_T: Tensor,
    timesteps: Sequence[int],
    step: Step,
    noise: Noise,
    clip: bool = True,
) -> Iterator[Tensor]:
    """Runs the reverse process; yields x after every step, in [-1, 1] where no noise is left: the last one is x_0.

    Args:
        denoise: the network with its conditions bound; called once per timestep.
        process: the forward process that the network was trained on.
        x_T: (B, K, C, H, W) standard normal noise.
        timesteps: descending.
        step: the rule, one of `make`.
        noise: gives the step's random numbers.
        clip: the estimate of x_0 is clipped to [-1, 1], the range of the data.
    """
    x, now = x_T, None
    for position, t in enumerate(timesteps):
        timestep = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
        x_0 = process.predict_x_0(x, timestep, denoise(x, timestep))
        if clip:
            x_0 = x_0.clamp(-1, 1)
        x_0 = process.normalised(x_0)
        last = position + 1 == len(timesteps)
        # Only one step of history is kept: the chain of estimates would otherwise hold every x of the run.
        now = Estimate(x, x_0, float(process.alphas_cumprod[t]), replace(now, before=None) if now else None)
        abar_next = 1.0 if last else float(process.alphas_cumprod[timesteps[position + 1]])
        x = step(now, abar_next, noise)
        yield process.restored(x)
