import math

import pytest
import torch

from fdm_cli.bound import Respaced, discretized_log_likelihood, normal_kl
from fdm_cli.config import DiffusionConfig
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput

PROCESS = Process(DiffusionConfig())


def test_the_divergence_is_the_integral():
    x = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
    p, q = torch.distributions.Normal(0.3, 1.5**0.5), torch.distributions.Normal(-1.0, 4.0**0.5)
    integral = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
    found = normal_kl(torch.tensor(0.3, dtype=torch.float64), 1.5, torch.tensor(-1.0, dtype=torch.float64), 4.0)
    assert float(found) == pytest.approx(float(integral), rel=1e-5)  # torch's Normal computes its scale in float32


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 0.3), (0.9, 0.05), (-1.2, 0.4)])
def test_the_masses_of_the_256_bins_add_up_to_one(mean, deviation):
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    found = discretized_log_likelihood(values, torch.full_like(values, mean), deviation)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-9)
    at = int(values.sub(mean).abs().argmin())
    if 0 < at < 255:
        low, high = ((float(values[at]) + side / 255 - mean) / deviation / 2**0.5 for side in (-1, 1))
        assert float(found[at]) == pytest.approx(math.log((math.erf(high) - math.erf(low)) / 2))


def test_at_all_timesteps_it_is_the_process_itself():
    respaced = Respaced.of(PROCESS, range(1000))
    betas, abar = PROCESS.betas, PROCESS.alphas_cumprod
    assert torch.allclose(respaced.beta, betas, rtol=1e-9)
    assert torch.allclose(respaced.variance[1:], betas[1:], rtol=1e-9)
    assert float(respaced.variance[0]) == pytest.approx(float(betas[1] * (1 - abar[0]) / (1 - abar[1])))


@pytest.mark.parametrize("error", [0.0, 0.125])
@pytest.mark.parametrize("timesteps", [range(1000), (0, 250, 600, 999)])
@pytest.mark.parametrize("data", [(0.0, 1.0), (-0.9, 0.37)])
def test_an_estimate_that_is_wrong_by_a_known_amount(timesteps, error, data):
    """Then the means of q and p differ by c times it, whatever the noise is, and every term has a closed form."""
    mean, std = data
    process = Process(DiffusionConfig(data_mean=mean, data_std=std))
    x_0 = torch.tensor([-0.5, 0.0, 0.25], dtype=torch.float64)
    respaced = Respaced.of(process, timesteps)
    noise = torch.Generator().manual_seed(0)
    for i, t in enumerate(respaced.timesteps):
        x_t = process.q_sample(x_0[None], torch.tensor([t]), torch.randn(1, 3, generator=noise, dtype=torch.float64))[0]
        found = respaced.term(i, x_0, x_t, x_0 + error)
        abar = float(PROCESS.alphas_cumprod[t])
        if i:
            before = float(PROCESS.alphas_cumprod[respaced.timesteps[i - 1]])
            beta = 1 - abar / before
            shrink = (1 - before) / (1 - abar)  # v_i / s_i
            expected = 0.5 * (shrink - 1 - math.log(shrink) + before * beta / (1 - abar) ** 2 * (error / std) ** 2)
            assert found.tolist() == pytest.approx([expected] * 3, rel=1e-6, abs=1e-12)
        else:
            second = float(PROCESS.alphas_cumprod[respaced.timesteps[1]])
            deviation = ((1 - second / abar) * (1 - abar) / (1 - second)) ** 0.5 * std
            low, high = (math.erf((side / 255 - error) / deviation / 2**0.5) for side in (-1, 1))
            assert found.tolist() == pytest.approx([-math.log(max((high - low) / 2, 1e-12))] * 3, rel=1e-6)
    last = float(PROCESS.alphas_cumprod[respaced.timesteps[-1]])
    expected = [0.5 * (-last - math.log(1 - last) + last * ((value - mean) / std) ** 2) for value in x_0.tolist()]
    assert respaced.prior(x_0).tolist() == pytest.approx(expected, rel=1e-6)


def test_one_timestep_is_no_process():
    with pytest.raises(BadInput, match="at least 2"):
        Respaced.of(PROCESS, [999, 999])
