"""The oracle computes what the predecessors computed."""

import pytest
import torch
from torch import Tensor

from tests.oracle import OracleUNet
from tests.oracle_process import OracleProcess
from tests.reference import ARCHITECTURES, GOLDEN, OFFICIAL, SEED, golden, network_timestep, network_weights, oracle


def assert_near(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize("name", GOLDEN)
def test_has_the_weights_of_the_official_format(name: str) -> None:
    ours = {key: weight.shape for key, weight in OracleUNet(**ARCHITECTURES[name]).state_dict().items()}
    theirs = {key: weight.shape for key, weight in network_weights(name).items()}
    assert list(ours.items()) == list(theirs.items())


def test_seed_preset_has_49_million_parameters() -> None:
    with torch.device("meta"):
        network = OracleUNet(**ARCHITECTURES["seed-preset"])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 49.06


@pytest.mark.parametrize("name", GOLDEN)
def test_eps_of_every_frame(name: str) -> None:
    figures = golden(name)
    with torch.no_grad():
        eps = oracle(name)(
            figures["x_t"],
            network_timestep(name, figures["timestep"]),
            figures["x_0"],
            figures["frame_indices"],
            figures["observed_mask"],
            figures["latent_mask"],
        )
    assert not (figures["observed_mask"] | figures["latent_mask"]).all(), "one frame is padding"
    assert_near(eps, figures["eps"], atol=2e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_betas(name: str) -> None:
    figures = golden(name)
    process = OracleProcess(len(figures["betas"]))
    assert_near(process.betas, figures["betas"], atol=1e-7)
    assert_near(process.alphas_cumprod, figures["alphas_cumprod"], atol=1e-7)


@pytest.mark.parametrize("name", SEED)
def test_q_sample(name: str) -> None:
    figures = golden(name)
    x_t = OracleProcess(len(figures["betas"])).q_sample(figures["x_0"], figures["timestep"], figures["q_sample_noise"])
    assert_near(x_t, figures["q_sample"], atol=1e-6)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_loss(name: str) -> None:
    """The squared error of all frames that are not observed, padding included, divided by all elements of a clip."""
    figures = golden(name)
    x_t = OracleProcess(len(figures["betas"])).q_sample(figures["x_0"], figures["timestep"], figures["loss_noise"])
    with torch.no_grad():
        eps = oracle(name)(
            x_t,
            network_timestep(name, figures["timestep"]),
            figures["x_0"],
            figures["frame_indices"],
            figures["observed_mask"],
            figures["latent_mask"],
        )
    unobserved = (~figures["observed_mask"])[:, :, None, None, None]
    loss = ((eps - figures["loss_noise"]).square() * unobserved).flatten(1).mean(dim=1)
    assert_near(loss, figures["loss"], atol=1e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_ancestral_chain(name: str) -> None:
    """All frames, observed ones too: they enter clean at every step, and the chain makes its own of them."""
    figures = golden(name)
    network, observed = oracle(name), figures["observed_mask"]

    def predict_eps(x_t: Tensor, timestep: Tensor) -> Tensor:
        timestep = network_timestep(name, timestep)
        return network(x_t, timestep, figures["x_0"], figures["frame_indices"], observed, ~observed)

    process = OracleProcess(len(figures["betas"]))
    with torch.no_grad():
        x_0 = process.chain(figures["chain_x_T"], figures["chain_noise"], predict_eps)
    assert_near(x_0, figures["chain_x_0"], atol=1e-3)


def test_convolutions_see_contiguous_frames() -> None:
    """An honest yardstick for speed: one layout throughout, never a convolution in a format that it must convert."""
    figures, network = golden("seed-micro"), oracle("seed-micro")
    inputs = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for clips in (1, 2):
        names = ("x_t", "timestep", "x_0", "frame_indices", "observed_mask", "latent_mask")
        network(*(figures[name][:clips] for name in names))
    assert inputs
    assert all(frames.is_contiguous() for frames in inputs)
