"""The draft: blocks of observed frames that move, and what becomes of them in the network."""

import pytest
import torch

from fdm_cli.config import Config, DiffusionConfig, ModelConfig, TrainingConfig
from fdm_cli.diffusion import Process
from fdm_cli.draft import NEIGHBOURS, SPEEDS, Draft
from fdm_cli.errors import BadInput
from fdm_cli.gradients import BLURS, Losses, draft_losses, window_of
from fdm_cli.training_batches import Batch
from fdm_cli.unet import UNet
from fdm_cli.window import Alike, Window
from tests.networks import randomise
from tests.test_patch_attention import call, inputs, network


def draft_of(size=32, channels=1) -> Draft:
    torch.manual_seed(0)
    return Draft(ModelConfig(image_size=size, image_channels=channels, channel_mult=(1,), attention_resolutions=()))


def moving(velocity, frames, size=32, channels=1, corner=(12, 12)):
    """(1, K, C, H, W) in [-1, 1]: a patterned square of 6 x 6 on black that moves by whole pixels a frame."""
    torch.manual_seed(1)
    square, video = 0.3 + 0.7 * torch.rand(channels, 6, 6), torch.zeros(1, len(frames), channels, size, size)
    for place, time in enumerate(frames):
        top, left = (start + step * time for start, step in zip(corner, velocity, strict=True))
        video[0, place, :, top : top + 6, left : left + 6] = square
    return 2 * video - 1


def says(draft: Draft, velocity) -> None:
    """Makes it give every block the same velocity, whatever it sees; what is empty counts nothing."""
    with torch.no_grad():
        draft.move.weight.zero_()
        draft.move.bias.copy_(torch.tensor([*velocity, 0.0]))
        draft.nothing.fill_(-30)


def batch_of(data) -> Batch:
    return Batch(
        data["x_0"], data["frame_indices"], data["observed_mask"], data["latent_mask"], data["timestep"], data["x_t"]
    )


def losses_of(draft, process, batch):
    window = window_of(batch)
    return draft_losses(draft(batch.x_0, batch.frame_indices, window.alike), process, batch, window)


def losses(model, batch, **training):
    return Losses(model, Process(model.diffusion), TrainingConfig(**training))(batch)


def made(draft, x_0, frames, observed):
    observed = torch.tensor(observed)[None].expand(len(x_0), -1)
    indices = torch.tensor(frames).expand(len(x_0), -1)
    with torch.no_grad():
        return draft(x_0, indices, Alike.among(observed, ~observed))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "velocity"), [(32, (1, -1)), (16, (0, 1)), (64, (-2, 1))])
def test_what_moves_arrives_where_its_velocity_takes_it(size, velocity, channels):
    """Ahead, back and between, from frames in any order and at any distance, whole and in its place."""
    frames, corner = [5, 0, 3, 1, 2, 4], (size // 3, size // 3)
    x_0 = moving(velocity, frames, size, channels, corner)
    draft = draft_of(size, channels)
    says(draft, [4 / (size // 8) * step for step in velocity])  # in units, four to a block
    drafts = made(draft, x_0, frames, [False, True, True, False, True, False])
    assert drafts.distance.tolist() == [2, 1, 1]
    torch.testing.assert_close(drafts.frames[None], x_0[:, [0, 3, 5]], rtol=0, atol=1e-4)
    assert (drafts.weight[:, 0][x_0[0, [0, 3, 5], 0] < -0.99].amin() == -30).item()


def test_half_a_pixel_is_the_mean_of_two_places():
    x_0 = moving((0, 0), [0, 1])
    draft = draft_of()
    says(draft, (0.5, 0))
    with torch.no_grad():
        draft.bright.zero_()
    one = (made(draft, x_0, [0, 1], [True, False]).frames[0, 0] + 1) / 2
    still = (x_0[0, 0, 0] + 1) / 2
    rows, columns = slice(13, 18), slice(12, 18)  # its inner rows: at its edge what is empty counts, too
    expected = (still[rows, columns] + still[12:17, columns]) / 2
    torch.testing.assert_close(one[rows, columns], expected, rtol=0, atol=1e-4)


def test_evidence_is_highest_for_the_velocity_that_is_true():
    """A patch is compared with what is where it would have been."""
    frames, velocity = list(range(7)), (1, -1)
    x_0 = moving(velocity, frames, corner=(10, 14))
    draft = draft_of()
    tokens = draft._tokens((x_0 + 1) / 2, torch.tensor([frames]))
    speeds = torch.cartesian_prod(*[torch.linspace(-1.8, 1.8, SPEEDS)] * 2)
    evidence, there = tokens.evidence.split((len(NEIGHBOURS) * SPEEDS**2, len(NEIGHBOURS)), dim=-1)
    evidence = evidence.unflatten(2, (len(NEIGHBOURS), -1))
    seen = 0
    for token in tokens.real[0].nonzero().squeeze(1).tolist():
        for number, step in enumerate(NEIGHBOURS):
            other = int(tokens.frame[0, token]) + step
            assert there[0, token, number] == float(0 <= other < 7)
            if not 0 <= other < 7:
                assert not evidence[0, token, number].any()
                continue
            fits = ((speeds * step).round() == torch.tensor(velocity) * step).all(1)
            if fits.any():
                right, wrong = evidence[0, token, number][fits], evidence[0, token, number][~fits]
                assert right.min() >= wrong.max() - 1e-5
                seen += int(right.min() > 2 * wrong.mean())
    assert seen > 20


def test_only_what_stands_out_is_a_token():
    x_0 = moving((0, 0), [0, 1])
    tokens = draft_of()._tokens((x_0[:, :1] + 1) / 2, torch.tensor([[0]]))
    blocks = {(int(y), int(x)) for y, x in zip(tokens.y[tokens.real], tokens.x[tokens.real], strict=True)}
    assert blocks == {(12, 12), (12, 16), (16, 12), (16, 16)}
    assert tokens.real.shape == (1, 20)  # five sixteenths of 64


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_frames_without_anything_in_them_give_drafts_of_their_background(value):
    drafts = made(draft_of(), torch.full((2, 3, 1, 32, 32), value), [0, 1, 2], [True, True, False])
    torch.testing.assert_close(drafts.frames, torch.full((2, 1, 32, 32), value))
    assert drafts.weight.isfinite().all()


@pytest.mark.parametrize("colours", [((1.0, 1.0, 1.0), (-1.0, -1.0, -1.0)), ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0))])
def test_what_stands_out_may_be_dark_or_of_another_colour(colours):
    """Black on white, blue on red, which are equally bright."""
    background, colour = (torch.tensor(channels)[:, None, None] for channels in colours)
    x_0 = background.expand(1, 3, 3, 32, 32).clone()
    for time in range(3):
        x_0[0, time, :, 12:18, 10 + time : 16 + time] = colour
    draft = draft_of(channels=3)
    says(draft, (0, 1))
    drafts = made(draft, x_0, [0, 1, 2], [True, True, False])
    torch.testing.assert_close(drafts.frames[None], x_0[:, 2:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [8, 24, 40])
def test_other_sizes_of_frames(size):
    draft = draft_of(size)
    randomise(draft)
    drafts = made(draft, torch.rand(1, 3, 1, size, size) * 2 - 1, [0, 1, 2], [True, True, False])
    assert drafts.frames.shape == (1, 1, size, size)
    assert drafts.frames.isfinite().all()


def drafted(**changes) -> UNet:
    model = network(draft="motion", **{"patch_attention": "none", **changes})
    randomise(model)
    return model


def test_clips_and_their_order_do_not_matter():
    draft = draft_of(16)
    randomise(draft)
    data = inputs()
    roles = data["observed_mask"], data["latent_mask"]
    with torch.no_grad():
        whole = draft(data["x_0"], data["frame_indices"], Alike.among(*roles)).frames
        for clips in ([0], [1], [1, 0]):
            own = [value[clips] for value in (data["x_0"], data["frame_indices"], *roles)]
            alike = Alike.among(own[2], own[3])
            frames = draft(own[0], own[1], alike).frames
            places = [place for group in alike for place in group.latent.flatten().tolist()]
            for frame, place in zip(frames, places, strict=True):
                there = [p for group in Alike.among(*roles) for p in group.latent.flatten().tolist()]
                expected = whole[there.index(clips[place // 6] * 6 + place % 6)]
                torch.testing.assert_close(frame, expected, rtol=1e-4, atol=1e-5)


def test_it_changes_nothing_until_the_network_has_learnt_from_it():
    with_it, without = network(draft="motion"), network()
    randomise(without)
    missing = with_it.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert all(key.startswith(("draft.", "of_draft.")) for key in missing)
    torch.testing.assert_close(call(with_it, inputs()), call(without, inputs()), rtol=0, atol=1e-6)
    randomise(with_it.of_draft)
    differs = (call(with_it, inputs()) - call(without, inputs())).abs().amax((2, 3, 4)) > 1e-4
    data = inputs()
    assert torch.equal(differs, data["latent_mask"] & data["observed_mask"].any(1, keepdim=True))


def test_a_clip_gives_the_same_alone_and_beside_others():
    model, data = drafted(), inputs()
    together = call(model, data)
    for clip in range(3):
        alone = call(model, {key: value[clip : clip + 1] for key, value in data.items()})
        torch.testing.assert_close(alone, together[clip : clip + 1], rtol=1e-4, atol=1e-5)


def test_drafts_that_are_made_once_give_what_each_call_makes():
    model, data = drafted(), inputs()
    window = Window.of(*(data[key] for key in ("frame_indices", "observed_mask", "latent_mask")))
    drafts = model.drafts(data["x_0"], data["frame_indices"], window)
    assert torch.equal(call(model, data, window=window, drafts=drafts), call(model, data))
    assert model.drafts(data["x_0"][2:], data["frame_indices"][2:], Window.of(
        *(data[key][2:] for key in ("frame_indices", "observed_mask", "latent_mask"))
    )) is None  # fmt: skip
    assert network().drafts(data["x_0"], data["frame_indices"], window) is None


@pytest.mark.parametrize(
    ("weights", "trained"),
    [("draft", "draft."), ("patch_attention", "patch_attention."), ("all", "")],
)
def test_what_is_trained(weights, trained):
    model = drafted(weights=weights, patch_attention="observed")
    own, of_draft = losses(model, batch_of(inputs()), weights=weights)
    (own + of_draft).mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(trained), name


def test_a_draft_that_learns_beside_the_network_learns_from_its_own_loss():
    """And what the network says is the same as of a draft that stays as it is."""
    model, batch = drafted(), batch_of(inputs())
    own, of_draft = losses(model, batch)
    alone, nothing = losses(model, batch, weights="draft")
    assert torch.equal(of_draft, alone)
    assert not nothing.any()
    assert torch.equal(own, losses(model, batch, weights="patch_attention")[0])
    draft = dict(model.draft.named_parameters())
    of_own = torch.autograd.grad(own.mean(), [model.of_draft.weight, *draft.values()], allow_unused=True)
    assert of_own[0].any()
    assert of_own[1:] == (None,) * len(draft)
    assert all(gradient.any() for gradient in torch.autograd.grad(of_draft.mean(), list(draft.values())))


def test_losses_are_the_squared_error_sharp_and_blurred():
    draft, data = draft_of(16), inputs()
    randomise(draft)
    process = Process(DiffusionConfig(data_mean=-0.5, data_std=0.4))
    with torch.no_grad():
        found = losses_of(draft, process, batch_of(data))
        for clip in range(2):
            alike = Alike.among(data["observed_mask"][clip : clip + 1], data["latent_mask"][clip : clip + 1])
            frames = draft(data["x_0"][clip : clip + 1], data["frame_indices"][clip : clip + 1], alike).frames
            error = (frames - data["x_0"][clip, data["latent_mask"][clip]]) / 0.4
            expected = error.square().mean()
            for part, weight in BLURS:
                half = max(1, 16 // part)
                size = 2 * half + 1
                padded = torch.nn.functional.pad(error, (half,) * 4)
                means = padded.unfold(2, size, half).unfold(3, size, half).mean((-1, -2))
                expected = expected + weight * means.square().mean()
            torch.testing.assert_close(found[clip], expected, rtol=1e-4, atol=1e-5)
    assert found[2] == 0  # observes nothing


@pytest.mark.parametrize("weights", ["draft", "all"])
def test_clips_that_observe_nothing_give_zero_gradients(weights):
    """Not none: processes that train together wait for them."""
    model, data = drafted(weights=weights), inputs()
    own, of_draft = losses(model, batch_of({key: value[2:] for key, value in data.items()}), weights=weights)
    (own + of_draft).mean().backward()
    told = [] if weights == "draft" else list(model.of_draft.parameters())
    assert all(not parameter.grad.any() for parameter in [*told, *model.draft.parameters()])


@pytest.mark.slow
def test_it_learns_how_things_move():
    """Of four squares that go different ways, what becomes of each."""
    draft, process = draft_of(), Process(DiffusionConfig())
    x_0 = torch.cat([moving(velocity, range(6), corner=(13, 13)) for velocity in ((1, 1), (1, -1), (-1, 0), (0, 0))])
    observed = (torch.arange(6) < 3).expand(4, -1)
    batch = Batch(x_0, torch.arange(6).expand(4, -1), observed, ~observed, torch.zeros(4), x_0)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        losses_of(draft, process, batch).mean().backward()
        optimizer.step()
    frames = made(draft, x_0, list(range(6)), [True] * 3 + [False] * 3).frames.view(4, 3, 1, 32, 32)
    error, still = ((guess - x_0[:, 3:]).square().mean((1, 2, 3, 4)) for guess in (frames, x_0[:, 2:3]))
    assert error[:3].mean() < 0.4 * still[:3].mean()
    assert error[3] < 0.4 * still[:3].mean()


def test_bad_configurations():
    with pytest.raises(BadInput, match="windows of one frame observe nothing"):
        Config(model=ModelConfig(draft="motion", window=1), training=TrainingConfig(weights="draft"))
    with pytest.raises(BadInput, match=r"model\.draft needs a model\.image_size that is a multiple of 8, not 12"):
        ModelConfig(draft="motion", image_size=12, channel_mult=(1,), attention_resolutions=())
    with pytest.raises(BadInput, match=r"training.weights draft: the network has no draft"):
        Config(model=ModelConfig(patch_attention="observed"), training=TrainingConfig(weights="draft"))
