import itertools
import math

import pytest
import torch

from fdm_cli import samplers
from fdm_cli.config import DiffusionConfig
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput
from fdm_cli.samplers import DDIM, Ancestral, DPMSolver, Estimate, choose_timesteps


def run(step, timesteps, process, denoise, clip=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(2, 3, 1, 4, 4, generator=generator, dtype=torch.float64)

    *_, x_0 = samplers.sample(denoise, process, noise(), timesteps, step, noise, clip)
    return x_0


def network(x_t, timestep):
    """Some smooth function of its input, standing for an imperfect network."""
    return torch.tanh(x_t * 1.7 + 0.3) + 0.001 * timestep.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("count", [2, 9, 25, 50])
def test_ddim_with_eta_1_is_ancestral_with_the_posterior_variance(count):
    process = Process(DiffusionConfig(timesteps=50))
    timesteps = choose_timesteps(50, count)
    ancestral = run(Ancestral(large=False), timesteps, process, network)
    torch.testing.assert_close(run(DDIM(eta=1.0), timesteps, process, network), ancestral, atol=1e-10, rtol=0)


def test_ancestral_noise_has_the_variance_of_the_way_between_two_chosen_timesteps():
    now = Estimate(torch.zeros(1), torch.zeros(1), abar=0.2)
    for large, variance in ((True, 1 - 0.2 / 0.5), (False, (1 - 0.2 / 0.5) * (1 - 0.5) / (1 - 0.2))):
        assert float(Ancestral(large)(now, 0.5, lambda: torch.ones(1))) ** 2 == pytest.approx(variance)


@pytest.mark.parametrize("count", [1, 2, 9, 50])
def test_dpm_solver_of_first_order_is_ddim_with_eta_0(count):
    process = Process(DiffusionConfig(timesteps=50))
    timesteps = choose_timesteps(50, count)
    ddim = run(DDIM(), timesteps, process, network)
    torch.testing.assert_close(run(DPMSolver(order=1), timesteps, process, network), ddim, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("step", "order"), [(DDIM(), 1), (DPMSolver(), 2)])
@pytest.mark.parametrize("std", [0.3, 0.5, 2.0])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_the_order_of_convergence(step, order, std, parameterization):
    """Data N(0, std^2) has an exact denoiser, and the probability flow keeps x_t / sqrt(abar std^2 + 1 - abar)."""
    process = Process(DiffusionConfig(parameterization=parameterization))

    def spread(abar):
        return (abar * std**2 + 1 - abar).sqrt()

    def denoise(x_t, timestep):
        abar = process.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
        x_0 = abar.sqrt() * std**2 / spread(abar) ** 2 * x_t
        eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
        return process.target(x_0, timestep, eps)

    x_T = torch.randn(1, 2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = x_T / spread(process.alphas_cumprod[-1]) * std
    errors = []
    for count in (64, 128, 256):
        timesteps = choose_timesteps(1000, count)
        *_, x_0 = samplers.sample(denoise, process, x_T, timesteps, step, torch.zeros_like, clip=False)
        errors.append(float((x_0 - exact).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.25


def test_ddim_with_eta_0_uses_no_noise():
    process = Process(DiffusionConfig())

    def no_noise():
        raise AssertionError("noise was drawn")

    x_T = torch.randn(1, 2, 1, 4, 4, dtype=torch.float64)
    steps = list(samplers.sample(network, process, x_T, choose_timesteps(1000, 7), DDIM(), no_noise))
    assert len(steps) == 7


@pytest.mark.parametrize("step", [Ancestral(), DDIM(), DPMSolver()])
@pytest.mark.parametrize("count", [1, 2, 10, 250])
@pytest.mark.parametrize("parameterization", ["eps", "v", "x_0"])
@pytest.mark.parametrize("data", [{}, {"data_mean": -0.9, "data_std": 0.37}])
def test_a_perfect_network_gives_the_data_back(step, count, parameterization, data):
    """A network that knows x_0 leads there whatever the number of steps: the noise levels are the right ones."""
    process = Process(DiffusionConfig(parameterization=parameterization, **data))
    x_0 = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64) * 2 - 1

    def oracle(x_t, timestep):
        abar = process.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
        eps = (x_t - abar.sqrt() * process.normalised(x_0)) / (1 - abar).sqrt()
        return process.target(x_0, timestep, eps)

    torch.testing.assert_close(run(step, choose_timesteps(1000, count), process, oracle), x_0, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("total", "steps"), [(1000, 1), (1000, 2), (1000, 25), (1000, 1000), (40, 7), (2, 2)])
def test_timesteps_start_at_pure_noise(total, steps):
    timesteps = choose_timesteps(total, steps)
    assert len(timesteps) == steps
    assert timesteps[0] == total - 1
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert steps == 1 or timesteps[-1] == 0


def test_a_shift_asks_more_often_where_there_is_much_noise():
    assert choose_timesteps(1000, 12, 2.0) == [999, 952, 901, 844, 781, 711, 632, 542, 440, 321, 183, 20]
    assert choose_timesteps(1000, 1000, 2.0) == list(range(999, -1, -1))
    for steps in (400, 500, 900):
        timesteps = choose_timesteps(1000, steps, 2.0)
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert (len(timesteps), timesteps[0]) == (steps, 999)
        assert timesteps[-1] >= 0


def test_bad_requests():
    for steps in (0, 1001):
        with pytest.raises(BadInput, match="sampling steps"):
            choose_timesteps(1000, steps)
    with pytest.raises(BadInput, match="unknown sampler 'dimm'") as caught:
        samplers.make("dimm")
    assert caught.value.hint == "did you mean 'ddim'?"
    with pytest.raises(BadInput, match=r"--eta 0\.5 is for ddim, ancestral has none"):
        samplers.make("ancestral", eta=0.5)
