import torch

from fdm_cli import config as configuration
from fdm_cli.batches import draw_batch
from fdm_cli.dataset import open_clips
from fdm_cli.trainer import Trainer


def make(*overrides) -> Trainer:
    config = configuration.load_preset("micro", overrides)
    return Trainer(config, open_clips(config), torch.device("cpu"))


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_the_loss_falls():
    trainer = make()
    losses = [trainer.train_step()[0] for _ in range(20)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_clip_belongs_to_its_number_not_to_its_batch():
    trainer = make()
    four = draw_batch(trainer.config, trainer.clips, 8, 4, 3)
    two = draw_batch(trainer.config, trainer.clips, 10, 2, 3)
    for name, tensor in vars(four).items():
        assert torch.equal(tensor[2:], getattr(two, name))


def test_state_goes_on_bit_for_bit():
    straight = make()
    for _ in range(6):
        straight.train_step()
    first = make()
    for _ in range(3):
        first.train_step()
    second = make()
    second.load(first.state())
    torch.rand(5)  # somebody else's random numbers change nothing
    for _ in range(3):
        second.train_step()
    for mine, other in zip(weights(second), weights(straight), strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(second.ema.parameters(), straight.ema.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_loss_that_is_not_a_number_changes_no_weights():
    trainer = make()
    trainer.train_step()
    before = weights(trainer)
    trainer.process.betas[:] = torch.nan
    trainer.process.alphas_cumprod[:] = torch.nan
    loss, _ = trainer.train_step()
    assert loss != loss
    assert trainer.step == 2
    for mine, other in zip(weights(trainer), before, strict=True):
        assert torch.equal(mine, other)
