"""The oracle computes what the predecessors' networks computed."""

import pytest
import torch
from torch import Tensor

from tests.oracle import OracleUNet
from tests.reference import ARCHITECTURES, GOLDEN, golden, network_timestep, network_weights, oracle


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
