"""The network's own errors in what training steps observe."""

from dataclasses import replace

import pytest
import torch

from fdm_cli.config import load_preset
from fdm_cli.dataset import open_clips
from fdm_cli.diffusion import Process
from fdm_cli.gradients import with_errors
from fdm_cli.training_batches import ERRORS_WITHIN, draw_batch
from fdm_cli.unet import UNet
from tests.networks import randomise


def batch_of(share, clips=40):
    config = load_preset("micro", [f"training.observed_errors={share}", "data.masks=continued"])
    return config, draw_batch(config, open_clips(config), 0, clips, 0)


def test_the_share_of_clips_that_get_errors():
    config, without = batch_of(0)
    assert (without.error_timestep == -1).all()
    _, some = batch_of(0.5)
    chosen = some.error_timestep >= 0
    assert 8 < chosen.sum() < 32
    low, high = (part * config.diffusion.timesteps for part in ERRORS_WITHIN)
    assert ((low <= some.error_timestep[chosen]) & (some.error_timestep[chosen] <= high)).all()
    for name, tensor in vars(without).items():  # all other draws are those of before
        assert name == "error_timestep" or torch.equal(getattr(some, name), tensor)


def test_observed_frames_become_what_the_network_makes_of_them():
    config, batch = batch_of(0.5, clips=8)
    torch.manual_seed(0)
    model, process = UNet(config), Process(config.diffusion)
    randomise(model)
    made = with_errors(model, process, batch)
    changed = (made.x_0 != batch.x_0).flatten(2).any(2)
    chosen = (batch.error_timestep >= 0) & batch.observed.any(1)
    assert torch.equal(changed, batch.observed & chosen[:, None])
    assert not made.x_0.requires_grad
    for clip in chosen.nonzero().squeeze(1).tolist():
        one = {key: value[clip : clip + 1] for key, value in vars(batch).items()}
        x_t = process.q_sample(one["x_0"], one["error_timestep"], one["eps"])
        alone = {"x_0": one["x_0"], "frame_indices": one["frame_indices"], "latent_mask": one["observed"]}
        output = model(x_t, one["error_timestep"], **alone, observed_mask=torch.zeros_like(one["observed"]))
        expected = process.predict_x_0(x_t, one["error_timestep"], output.detach()).clamp(-1, 1)[one["observed"]]
        torch.testing.assert_close(made.x_0[clip : clip + 1][one["observed"]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left_out", ["observed", "error_timestep"])
def test_without_errors_nothing_is_called(left_out):
    """Neither where no clip is to get any nor where none observes anything."""
    _, batch = batch_of(1, clips=2)
    value = torch.full_like(getattr(batch, left_out), -1 if left_out == "error_timestep" else False)
    batch = replace(batch, **{left_out: value})
    assert with_errors(None, None, batch) is batch
