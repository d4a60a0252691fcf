import torch

from fdm_cli import config as configuration
from fdm_cli import held_out
from fdm_cli.dataset import open_clips
from fdm_cli.diffusion import Process
from fdm_cli.distributed import Ranks
from fdm_cli.unet import UNet
from tests.networks import randomise


class Guess(torch.nn.Module):
    """Says zero everywhere."""

    draft = None

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))
        self.timesteps = []

    def forward(self, x_t, timestep, **_):
        self.timesteps += timestep.tolist()
        return torch.zeros_like(x_t)


def measure(model, at_once=16, *overrides):
    config = configuration.load_preset("micro", ("model.window=4", "data.clip_length=8", *overrides))
    clips = open_clips(config, "held-out")
    return held_out.measure(model, Process(config.diffusion), config, clips, at_once, Ranks())


def test_a_guess_of_zero_loses_the_variance_of_eps_in_every_quarter_of_the_timesteps():
    model = Guess()
    measured = measure(model, 16, "diffusion.parameterization=eps")
    assert all(abs(value - 1) < 0.06 for value in measured.quartiles)
    quarters = torch.tensor(model.timesteps).view(4, -1)
    assert [(int(quarter.min()), int(quarter.max())) for quarter in quarters] == [
        (7, 242), (257, 492), (507, 742), (757, 992)
    ]  # fmt: skip
    assert measured.loss == sum(measured.quartiles) / 4


def test_it_is_the_same_for_every_seed_masks_and_number_of_clips_at_once():
    torch.manual_seed(0)
    config = configuration.load_preset("micro", ("model.window=4", "data.clip_length=8"))
    model = UNet(config).eval()
    randomise(model)  # a fresh one says zero, whatever it is given
    first = measure(model)
    growing = ("data.first_clip_length=2", "data.growth_steps=99")
    for again in (
        measure(model, 64, "training.seed=7"),
        measure(model, 5, "data.masks=filled"),
        measure(model, 16, "training.timestep_shift=3"),
        measure(model, 16, "training.observed_blur=1"),
        measure(model, 16, *growing),
    ):
        assert torch.allclose(torch.tensor(again.quartiles), torch.tensor(first.quartiles), rtol=1e-4)
