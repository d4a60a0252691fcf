"""Patch attention against a plain second implementation, and what must not change with it."""

import pytest
import torch
import torch.nn.functional as F

from fdm_cli.config import Config, DiffusionConfig, ModelConfig, TrainingConfig
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput
from fdm_cli.patch_attention import MARGINS, PatchAttention
from fdm_cli.unet import UNet
from fdm_cli.window import Alike, Window
from tests.networks import randomise

SMALL = {"image_size": 16, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "dropout": 0.0}
SMALL |= {"attention_resolutions": (), "num_heads": 2, "window": 6}


def network(parameterization="v", weights="all", patch_attention="observed", **changes) -> UNet:
    model = ModelConfig(patch_attention=patch_attention, **{**SMALL, **changes})
    diffusion = DiffusionConfig(timesteps=50, parameterization=parameterization, data_mean=-0.5, data_std=0.4)
    torch.manual_seed(0)
    return UNet(Config(model=model, diffusion=diffusion, training=TrainingConfig(weights=weights)))


def inputs(channels=1):
    """Clips of 2 observed and 3 latent frames, of 4 and 1, of none and 5; the sixth frame is padding."""
    roles = torch.tensor([[0, 1, 1, 0, 1, 2], [0, 0, 1, 0, 0, 2], [1, 1, 1, 1, 1, 2]])
    torch.manual_seed(1)
    return {
        "x_t": torch.randn(3, 6, channels, 16, 16),
        "timestep": torch.tensor([3, 31, 12]),
        "x_0": torch.rand(3, 6, channels, 16, 16) * 2 - 1,
        "frame_indices": torch.tensor([[0, 2, 3, 4, 7, 9]] * 3),
        "observed_mask": roles == 0,
        "latent_mask": roles == 1,
    }


def call(model, data, **options):
    data = {key: value.clone() for key, value in data.items()}
    return model(data.pop("x_t"), data.pop("timestep"), **data, **options)


def plain(attention: PatchAttention, process: Process, output, data, activated):
    """Clip by clip, block by block, all differences written out."""
    block, changed = attention.block, output.clone()
    x_0 = process.predict_x_0(data["x_t"], data["timestep"], output.detach()).clamp(-1, 1)
    estimate, clean = process.normalised(x_0), process.normalised(data["x_0"])

    def patches(video, margin, stride):
        after = margin + block - 1 if stride == 1 else margin
        padded = F.pad(video, (margin, after, margin, after), mode="replicate")
        return F.unfold(padded, block + 2 * margin, stride=stride).mT  # (frames, patches, pixels)

    def features(layer, video, margin, stride):
        return patches(video, margin, stride) @ layer.weight.flatten(1).T

    for clip, (seen, wanted) in enumerate(zip(data["observed_mask"], data["latent_mask"], strict=True)):
        if not seen.any():
            continue
        sharpness = attention.sharpness(activated[clip]).exp()
        scale, shift = attention.of_time(activated[clip]).chunk(2)
        contents = features(attention.content, clean[clip, seen], MARGINS[0], 1).flatten(0, 1)
        for frame in wanted.nonzero().squeeze(1).tolist():
            one = estimate[clip, frame][None]
            own = features(attention.content, one, MARGINS[0], block)[0]
            noisy = features(attention.content, data["x_t"][clip, frame][None], MARGINS[0], block)[0]
            columns = []
            for head, (layer, margin) in enumerate(zip(attention.compare, MARGINS, strict=True)):
                asking = features(layer, one, margin, block)[0]
                answering = features(layer, clean[clip, seen], margin, 1).flatten(0, 1)
                squares = (asking[:, None] - answering[None]).square().sum(-1)
                columns.append((-sharpness[head] * squares).softmax(-1) @ contents - own)
            drawn = F.unfold(output[clip, frame][None], block, stride=block)[0].T
            h = torch.cat([*columns, own, noisy, drawn], dim=1).T.unflatten(1, (16 // block, 16 // block))[None]
            h = attention.first(h) * (1 + scale[:, None, None]) + shift[:, None, None]
            h = h + attention.second(F.silu(h))
            h = F.silu(h)
            h = h + attention.third(h)
            changed[clip, frame] = changed[clip, frame] + F.pixel_shuffle(attention.last(F.silu(h)), block)[0]
    return changed


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("parameterization", "patch_size"), [("v", 2), ("eps", 1), ("x_0", 4)])
def test_it_equals_a_plain_implementation(parameterization, channels, patch_size):
    """Outputs and the gradients of all its weights."""
    model = network(parameterization, image_channels=channels, patch_size=patch_size)
    randomise(model)
    attention, process, data = model.patch_attention, Process(model.diffusion), inputs(channels)
    torch.manual_seed(2)
    output, activated = torch.randn(3, 6, channels, 16, 16), torch.randn(3, 128)
    alike = Alike.among(data["observed_mask"], data["latent_mask"])
    shipped = attention(output, data["x_t"], data["x_0"], data["timestep"], activated, alike)
    expected = plain(attention, process, output, data, activated)
    torch.testing.assert_close(shipped, expected, rtol=1e-4, atol=1e-4)
    assert (shipped - output)[data["latent_mask"]].abs().max() > 1e-2
    weight = torch.randn_like(output)
    names = [name for name, _ in attention.named_parameters()]
    for name, one, two in zip(
        names,
        torch.autograd.grad((shipped * weight).sum(), list(attention.parameters())),
        torch.autograd.grad((expected * weight).sum(), list(attention.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3 * float(two.abs().max()), msg=name)


def test_it_starts_as_the_identity():
    with_it, without = network(), network(patch_attention="none")
    randomise(without)
    missing = with_it.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert all(key.startswith("patch_attention.") for key in missing)
    assert torch.equal(call(with_it, inputs()), call(without, inputs()))


def test_only_latent_frames_of_clips_that_observe_something_are_changed():
    model, data = network(), inputs()
    randomise(model)
    changed = call(model, data, frames="all")
    model.patch_attention = None
    unchanged = call(model, data, frames="all")
    differs = (changed != unchanged).flatten(2).any(2)
    assert torch.equal(differs, data["latent_mask"] & data["observed_mask"].any(1, keepdim=True))


def test_a_clip_gives_the_same_alone_and_beside_others():
    model, data = network(), inputs()
    randomise(model)
    together = call(model, data)
    for clip in range(3):
        alone = call(model, {key: value[clip : clip + 1] for key, value in data.items()})
        torch.testing.assert_close(alone, together[clip : clip + 1], rtol=1e-4, atol=1e-5)


def test_what_has_moved_is_found_where_it_was():
    """Of a latent frame that is an observed one moved, each block finds its own content, whole."""
    model = network()
    attention, process = model.patch_attention, Process(model.diffusion)
    torch.manual_seed(3)
    scene = torch.rand(1, 1, 16, 19) * 2 - 1
    x_0 = torch.stack([scene[..., :16], scene[..., 3:]], dim=1)  # the second 3 pixels further
    observed = torch.tensor([[True, False]])
    with torch.no_grad():
        attention.sharpness.bias += 3
        normal = process.normalised(x_0)[0]
        found = attention._found(
            normal[1:], normal, attention.sharpness(torch.zeros(1, 128)).exp(), Alike.among(observed, ~observed)
        )
        own = attention._blocks(attention.content, normal[1:], MARGINS[0])
    error = (found[:, : len(own[0])] - own)[..., 1:5].square().mean() / own.square().mean()  # within both frames
    assert error < 0.01


def test_training_it_alone_leaves_all_other_weights_without_gradients():
    model = network(weights="patch_attention")
    randomise(model)
    call(model, inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("patch_attention."), name


def test_windows_without_observed_frames_give_zero_gradients():
    """Not none: processes that train together wait for them."""
    model, data = network(weights="patch_attention"), inputs()
    call(model, {key: value[2:] for key, value in data.items()}).square().sum().backward()
    assert all(not parameter.grad.any() for parameter in model.patch_attention.parameters())


def test_it_is_computed_in_fp32_under_autocast():
    model, data = network(), inputs()
    randomise(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = call(model, data)
    assert half.dtype == torch.float32
    whole = call(model, data)
    assert (half - whole).norm().item() / whole.norm().item() < 0.05


def test_clips_are_sorted_by_their_numbers_of_frames():
    data = inputs()
    window = Window.of(*(data[key] for key in ("frame_indices", "observed_mask", "latent_mask")))
    observed, latent = data["observed_mask"].flatten(), data["latent_mask"].flatten()
    assert window.alike is window.alike
    assert sorted(int(clip) for group in window.alike for clip in group.clips) == [0, 1]
    for group in window.alike:
        assert observed[group.observed].all()
        assert latent[group.latent].all()
        assert (group.observed // 6 == group.clips[:, None]).all()
        assert (group.latent // 6 == group.clips[:, None]).all()


def test_bad_configurations():
    with pytest.raises(BadInput, match=r"even model\.image_size"):
        ModelConfig(patch_attention="observed", image_size=15, channel_mult=(1,), attention_resolutions=())
    with pytest.raises(BadInput, match=r"training\.weights patch_attention: the network has none"):
        Config(training=TrainingConfig(weights="patch_attention"))
