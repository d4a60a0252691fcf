import pytest
import torch

from fdm_cli.config import DiffusionConfig
from fdm_cli.diffusion import Process, make_betas


@pytest.mark.parametrize("parameterization", ["eps", "v", "x_0"])
@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("data", [{}, {"data_mean": -0.9, "data_std": 0.37}])
def test_the_target_gives_x_0_back(parameterization, betas, data):
    process = Process(DiffusionConfig(betas=betas, parameterization=parameterization, **data))
    x_0, eps = (torch.randn(4, 3, 1, 8, 8, dtype=torch.float64) for _ in range(2))
    timestep = torch.tensor([0, 10, 500, 900])
    x_t = process.q_sample(x_0, timestep, eps)
    target = process.target(x_0, timestep, eps)
    torch.testing.assert_close(process.predict_x_0(x_t, timestep, target), x_0)
    torch.testing.assert_close(process.output_for(x_t, timestep, x_0), target)


def test_of_normalised_data_neither_x_t_nor_v_changes_its_scale_and_they_are_not_correlated():
    process = Process(DiffusionConfig(parameterization="v", data_mean=-0.9, data_std=0.37))
    x_0 = -0.9 + 0.37 * torch.randn(3, 10, 1, 100, 100, dtype=torch.float64)
    eps, timestep = torch.randn_like(x_0), torch.tensor([50, 200, 900])
    x_t, v = process.q_sample(x_0, timestep, eps).flatten(1), process.target(x_0, timestep, eps).flatten(1)
    for values in (x_t, v):
        assert values.mean(1).tolist() == pytest.approx([0] * 3, abs=0.02)
        assert values.std(1).tolist() == pytest.approx([1] * 3, abs=0.02)
    assert (x_t * v).mean(1).tolist() == pytest.approx([0] * 3, abs=0.02)
    torch.testing.assert_close(process.restored(process.normalised(x_0)), x_0)


def test_schedules():
    assert make_betas("linear", 1000)[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert make_betas("linear", 40)[[0, -1]].tolist() == pytest.approx([25e-4, 0.5])
    for betas in ("linear", "cosine"):
        abar = Process(DiffusionConfig(betas=betas)).alphas_cumprod
        assert (abar.diff() < 0).all()
        assert abar[0] > 0.999
        assert abar[-1] < 1e-4


def test_the_loss_counts_latent_frames_only_and_each_clip_by_its_own():
    process = Process(DiffusionConfig())
    x_0 = torch.zeros(2, 4, 1, 2, 2)
    eps = torch.zeros_like(x_0)
    output = torch.zeros_like(x_0)
    output[0, 0] = 3.0  # latent: counts
    output[0, 1] = 100.0  # not latent: does not
    output[1, :2] = 2.0
    latent = torch.tensor([[True, False, False, True], [True, True, False, False]])
    loss = process.loss(x_0, torch.tensor([5, 6]), eps, output, latent)
    assert loss.tolist() == [4.5, 4.0]


def test_values_that_are_not_numbers_on_other_frames_do_not_matter():
    process = Process(DiffusionConfig())
    output = torch.zeros(1, 2, 1, 2, 2)
    output[0, 1] = torch.nan
    output.requires_grad_()
    zeros = torch.zeros(1, 2, 1, 2, 2)
    process.loss(zeros, torch.tensor([5]), zeros, output, torch.tensor([[True, False]])).sum().backward()
    assert torch.isfinite(output.grad).all()
