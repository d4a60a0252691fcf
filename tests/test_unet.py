"""The shipped network against the predecessors' figures and against the plain second implementation."""

import itertools

import pytest
import torch

from fdm_cli.attention import Distances, TemporalBias
from fdm_cli.blocks import Conditions, Positions, ResidualBlock
from fdm_cli.config import Config, DiffusionConfig, ModelConfig, load_preset
from fdm_cli.unet import UNet
from fdm_cli.window import Window
from tests.bench import flops
from tests.networks import randomise
from tests.oracle import OracleUNet
from tests.reference import ARCHITECTURES


def network(name: str, timesteps: int = 50, **changes) -> UNet:
    model = ModelConfig(window=16, **{**ARCHITECTURES[name], **changes})
    diffusion = DiffusionConfig(timesteps=timesteps, rescale_timesteps=name == "fdm-official")
    torch.manual_seed(0)
    return UNet(Config(model=model, diffusion=diffusion)).eval()


def inputs(clips=2, frames=6, size=16, channels=1, seed=0):
    torch.manual_seed(seed)
    roles = torch.tensor([[0, 1, 1, 0, 1, 2], [1, 1, 0, 2, 2, 1]])[:clips, :frames]
    return {
        "x_t": torch.randn(clips, frames, channels, size, size),
        "timestep": torch.tensor([3, 31])[:clips],
        "x_0": torch.randn(clips, frames, channels, size, size),
        "frame_indices": torch.stack([torch.randperm(40)[:frames] for _ in range(clips)]),
        "observed_mask": roles == 0,
        "latent_mask": roles == 1,
    }


def call(model, data, **options):
    data = dict(data)
    return model(data.pop("x_t"), data.pop("timestep"), **data, **options)


def test_the_seed_preset_has_49_million_parameters():
    with torch.device("meta"):
        model = UNet(Config())
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 49.06


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_resolutions": ()},
        {"attention_resolutions": (16, 8)},
        {"channel_mult": (1, 2, 2), "attention_resolutions": (4,)},
        {"num_res_blocks": 2, "num_heads": 4},
    ],
)
def test_outputs_and_gradients_equal_the_oracle_s(changes):
    """Wherever the attentions are: only latent frames count, and only they are computed."""
    model = network("seed-small", dropout=0.0, **changes)
    oracle = OracleUNet(**{**ARCHITECTURES["seed-small"], "dropout": 0.0, **changes}).eval()
    randomise(model)
    oracle.load_state_dict(model.state_dict())
    data = inputs()
    expected = oracle(**data)
    latent = data["latent_mask"]
    for frames in ("all", "latent"):
        ours = call(model, data, frames=frames)
        torch.testing.assert_close(ours[latent], expected[latent], atol=2e-5, rtol=1e-4)
    weight = torch.randn_like(expected) * latent[:, :, None, None, None]
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    expected_gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - expected_gradients[name]).abs().max() / largest
        assert difference < 1e-4, f"{name}: gradients differ by {difference:.1e} of the largest"


def test_a_block_s_gradients_do_not_depend_on_the_memory_format_of_its_input():
    block = ResidualBlock(64, 32, 16, dropout=0.0).to(memory_format=torch.channels_last)
    randomise(block)
    block.double()
    conditions = Conditions(torch.randn(2, 16, dtype=torch.float64), {}, None, torch.tensor([0, 0, 1]))
    inputs = torch.randn(3, 64, 8, 8, dtype=torch.float64)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        block.zero_grad()
        x = inputs.clone(memory_format=layout).requires_grad_()
        block(x, conditions).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in block.parameters())])
    torch.testing.assert_close(*gradients)


def test_gradients_do_not_depend_on_how_threads_meet():
    """As many clips and pairs of frames as PyTorch divides among threads, where it adds what falls on one place."""
    threads = torch.get_num_threads()
    bias = TemporalBias(4)
    distances = Distances.between(torch.arange(16).expand(64, 16))
    weight = torch.randn(64, 4, 16, 16)
    gradients = []
    try:
        torch.set_num_threads(2)
        for _ in range(10):
            bias.zero_grad()
            (bias(distances) * weight).sum().backward()
            gradients.append(bias.slope.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_what_the_network_must_not_see():
    """x_t of observed frames, x_0 of others, and padding's content do not reach latent frames."""
    model = network("seed-small", dropout=0.0)
    randomise(model)
    data = inputs()
    data["latent_mask"] |= ~data["observed_mask"]  # no padding: its content is in the normalisation's statistics
    with torch.no_grad():
        expected = call(model, data)
        changed = dict(data, x_t=data["x_t"].clone(), x_0=data["x_0"].clone())
        changed["x_t"][data["observed_mask"]] = 5.0
        changed["x_0"][~data["observed_mask"]] = 5.0
        torch.testing.assert_close(call(model, changed), expected)
        changed["x_0"][data["observed_mask"]] += 1.0
        assert not torch.allclose(call(model, changed), expected)


def test_only_differences_of_frame_indices_count_and_order_does_not():
    model = network("seed-small", dropout=0.0)
    randomise(model)
    data = inputs()
    with torch.no_grad():
        expected = call(model, data, frames="all")
        moved = dict(data, frame_indices=data["frame_indices"] + 1000)
        torch.testing.assert_close(call(model, moved, frames="all"), expected, atol=1e-5, rtol=1e-4)
        order = torch.randperm(6)
        shuffled = {key: value if key == "timestep" else value[:, order] for key, value in data.items()}
        torch.testing.assert_close(call(model, shuffled, frames="all"), expected[:, order], atol=1e-5, rtol=1e-4)


def test_a_window_made_beforehand_changes_nothing():
    model = network("seed-small", dropout=0.0)
    randomise(model)
    data = inputs()
    window = Window.of(data["frame_indices"], data["observed_mask"], data["latent_mask"])
    with torch.no_grad():
        assert torch.equal(call(model, data, window=window), call(model, data))


@pytest.mark.parametrize("multiple", [2, 5, 100])
def test_frames_that_make_up_a_number_change_nothing_of_the_latent_ones(multiple):
    model = network("seed-small", dropout=0.0)
    randomise(model)
    data = inputs()
    latent = data["latent_mask"]
    masks = data["frame_indices"], data["observed_mask"], latent
    window = Window.of(*masks, multiple=multiple)
    assert len(window.latent_frames) == min(latent.numel(), -(-int(latent.sum()) // multiple) * multiple)
    assert set(latent.flatten().nonzero().flatten().tolist()) <= set(window.latent_frames.tolist())
    with torch.no_grad():
        made_up, expected = call(model, data, window=window), call(model, data)
    torch.testing.assert_close(made_up[latent], expected[latent], atol=1e-5, rtol=1e-4)


def test_patches_and_the_plain_residual():
    model = network("seed-small", patch_size=2, attention_resolutions=(8, 4), attention_residual="plain")
    randomise(model)
    data = inputs()
    with torch.no_grad():
        every, only_latent = call(model, data, frames="all"), call(model, data)
    assert every.shape == data["x_t"].shape
    latent = data["latent_mask"]
    torch.testing.assert_close(only_latent[latent], every[latent], atol=1e-5, rtol=1e-4)


def test_a_call_without_latent_frames():
    model, data = network("seed-small"), inputs()
    randomise(model)
    assert not call(model, {**data, "latent_mask": torch.zeros_like(data["latent_mask"])}).any()


def test_a_fresh_network_predicts_zero():
    model = network("seed-small")
    assert not call(model, inputs()).any()


@pytest.mark.parametrize("name", ["seed-small", "fdm-official", "seed-preset"])
def test_weights_are_named_as_in_the_official_format(name):
    with torch.device("meta"):
        ours = UNet(Config(model=ModelConfig(**ARCHITECTURES[name]))).state_dict()
        theirs = OracleUNet(**ARCHITECTURES[name]).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_no_two_gradients_share_memory():
    """They are added to and clipped in place, each for itself."""
    model = network("seed-small")
    randomise(model)
    call(model, inputs()).sum().backward()
    places = [(p.grad.data_ptr(), p.grad.data_ptr() + p.grad.nbytes) for p in model.parameters()]
    places.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


def test_learned_positions_tell_places_apart():
    """Without them the inside of a frame of one colour looks the same everywhere; with them it does not."""
    outputs = {}
    for positions in ("none", "learned"):
        model = network("seed-micro", positions=positions, image_size=32, attention_resolutions=())
        randomise(model)
        data = inputs(size=32)
        for name in ("x_t", "x_0"):
            data[name] = torch.ones_like(data[name])
        with torch.no_grad():
            outputs[positions] = call(model, data, frames="all")
    far_from_edges = {name: output[..., 14:18, 14:18].std((-2, -1)) for name, output in outputs.items()}
    assert far_from_edges["none"].max() < 1e-4
    assert far_from_edges["learned"].min() > 1e-3
    assert [name for name, _ in model.named_parameters() if "embedding" in name] == ["input_blocks.0.1.embedding"]


def test_learned_positions_leave_half_precision_as_it_is():
    positions = Positions(32, 8)
    x = torch.randn(2, 32, 8, 8)
    assert positions(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(positions(x), x + positions.embedding)


def test_heads_begin_with_a_distance_each():
    bias = TemporalBias(4)(Distances.between(torch.tensor([[0, 1, 2, 3, 4, 9, 17]])))
    of_frame_3 = bias[0, :, 3]  # (heads, K)
    assert of_frame_3[:3].argmax(1).tolist() == [2, 4, 1]  # the frame before, the one after, two before
    assert of_frame_3[3].tolist() == [0] * 7
    assert bias[0, 0, 6].argmax() == 5  # the frame before lies 8 back


def test_the_temporal_bias_is_learned():
    model = network("seed-small", temporal_bias="learned")
    randomise(model)
    call(model, inputs()).square().sum().backward()
    biases = [
        p
        for name, p in model.named_parameters()
        if ".bias.place" in name or ".bias.slope" in name or ".bias.own" in name
    ]
    assert len(biases) == 3 * len(model._temporal_attentions)
    assert all(p.grad.abs().max() > 0 for p in biases)


@pytest.mark.parametrize("preset", ["micro", "moving-mnist-small", "moving-mnist"])
@pytest.mark.slow
def test_all_tensors_are_on_the_network_s_device(preset):
    """On PyTorch's `meta` device, which stands for any that is not the CPU.

    What looks at observed frames groups the clips by their masks, which have no values there.
    """
    config = load_preset(preset, ["model.draft=none", "model.patch_attention=none"])
    size, channels, frames = config.model.image_size, config.model.image_channels, config.model.window
    model = UNet(config).to("meta")
    with torch.device("meta"):
        latent = torch.ones(2, frames, dtype=torch.bool)
        window = Window(
            observed=~latent,
            latent=latent,
            allowed=latent[:, :, None] == latent[:, None, :],
            distances=Distances(
                torch.zeros(31, 3),
                torch.zeros(31, dtype=torch.int64),
                torch.zeros(2, frames, frames, dtype=torch.int64),
            ),
            clip_of_frame=torch.arange(2).repeat_interleave(frames),
            latent_frames=torch.arange(2 * frames),
        )
        video, timestep = torch.zeros(2, frames, channels, size, size), torch.zeros(2, dtype=torch.int64)
        indices = torch.arange(frames).expand(2, -1)
    masks = {"observed_mask": ~latent, "latent_mask": latent}
    output = model(video, timestep, x_0=video, frame_indices=indices, **masks, window=window)
    output.sum().backward()
    assert output.shape == video.shape
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())


def test_after_the_last_attention_only_latent_frames_are_computed():
    model, data = network("seed-small", dropout=0.0), inputs()
    with torch.no_grad():
        latent, every = (flops(lambda frames=frames: call(model, data, frames=frames)) for frames in ("latent", "all"))
    assert latent < 0.85 * every  # half of the frames are latent
