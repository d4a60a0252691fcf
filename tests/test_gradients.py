"""The losses of a training step that are not another module's."""

import pytest
import torch

from fdm_cli.config import Config, ModelConfig, TrainingConfig
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput
from fdm_cli.gradients import OF_SINGLES, single_losses
from tests.networks import randomise
from tests.test_draft import batch_of, drafted, losses
from tests.test_patch_attention import call, inputs, network


@pytest.mark.parametrize(
    ("number", "places"), [(1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (6, range(6)), (50, range(6))]
)
def test_single_frames_are_windows_of_their_own(number, places):
    model, data = network(), inputs()
    randomise(model)
    process = Process(model.diffusion)
    found = single_losses(model, process, batch_of(data), "fp32", number)
    for clip in range(3):
        own = []
        for place in places:
            if not data["latent_mask"][clip, place]:
                continue
            x_0, eps = (data[key][clip : clip + 1, place : place + 1] for key in ("x_0", "x_t"))
            timestep, latent = data["timestep"][clip : clip + 1], torch.tensor([[True]])
            alone = {
                "x_t": process.q_sample(x_0, timestep, eps),
                "timestep": timestep,
                "x_0": torch.zeros_like(x_0),
                "frame_indices": torch.tensor([[17]]),
                "observed_mask": ~latent,
                "latent_mask": latent,
            }
            own.append((call(model, alone) - process.target(x_0, timestep, eps)).square().mean())
        expected = torch.stack(own).mean() if own else torch.zeros(())
        torch.testing.assert_close(found[clip], expected, rtol=1e-4, atol=1e-5)
        assert bool(found[clip]) == bool(own)


@pytest.mark.parametrize("weighting", ["none", "min-snr"])
def test_they_are_learnt_beside_the_clips_and_a_draft(weighting):
    model, batch = drafted(), batch_of(inputs())
    process = Process(model.diffusion)
    own, of_draft = losses(model, batch, loss_weighting=weighting)
    same, beside = losses(model, batch, loss_weighting=weighting, single_frames=6)
    assert torch.equal(same, own)
    weight = process.loss_weight(weighting, batch.timestep) if weighting != "none" else 1
    singles = single_losses(model, process, batch, "fp32", 6)
    torch.testing.assert_close(beside, of_draft + OF_SINGLES * weight * singles)


def test_single_frames_that_nothing_could_learn_from_are_refused():
    for model, training, says in (
        (ModelConfig(draft="motion"), TrainingConfig(single_frames=1, weights="draft"), "with training.weights draft"),
        (ModelConfig(window=4), TrainingConfig(single_frames=5), "5 is more than model.window 4"),
    ):
        with pytest.raises(BadInput, match=says.replace(".", r"\.")):
            Config(model=model, training=training)
