import pytest
import torch
import torch.nn.functional as F

from fdm_cli import winograd
from fdm_cli.winograd import Conv3x3

SHAPES = [(5, 64, 64, 16, 16), (3, 96, 48, 32, 32), (70, 64, 128, 4, 4), (1, 64, 64, 12, 8), (9, 256, 128, 8, 8)]


@pytest.fixture
def counted(monkeypatch):
    """How often the transforms were really used."""
    calls = []
    plain = winograd._convolve
    monkeypatch.setattr(winograd, "FEWEST_CHANNEL_TILES", 1)
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 16)
    monkeypatch.setattr(winograd, "_convolve", lambda *arguments: calls.append(1) or plain(*arguments))
    return calls


@pytest.mark.parametrize(("frames", "channels", "out_channels", "height", "width"), SHAPES)
@pytest.mark.parametrize("at_once", [16, 128])
def test_outputs_and_gradients_are_those_of_pytorch(
    frames, channels, out_channels, height, width, at_once, counted, monkeypatch
):
    monkeypatch.setattr(winograd, "TILES_AT_ONCE", at_once)
    torch.manual_seed(0)
    conv = Conv3x3(channels, out_channels).to(memory_format=torch.channels_last)
    x = torch.randn(frames, channels, height, width).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(frames, out_channels, height, width)
    y = conv(x)
    y.backward(dy)
    assert len(counted) == 2  # forward, and the gradient of the input

    exact_x, weight, bias = (value.detach().double().requires_grad_() for value in (x, conv.weight, conv.bias))
    exact = F.conv2d(exact_x, weight, bias, padding=1)
    exact.backward(dy.double())
    assert y.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in (
        (y, exact),
        (x.grad, exact_x.grad),
        (conv.weight.grad, weight.grad),
        (conv.bias.grad, bias.grad),
    ):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_as_exact_as_the_direct_sum():
    torch.manual_seed(0)
    x = torch.randn(16, 128, 32, 32).contiguous(memory_format=torch.channels_last)
    conv = Conv3x3(128, 128).to(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    with torch.no_grad():
        error, direct = (
            (y - exact).square().mean().sqrt() for y in (conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
        )
    assert error < 4 * direct


@pytest.mark.parametrize("shape", [(8, 8, 64, 64), (8, 128, 6, 64), (8, 128, 30, 32), (1, 128, 8, 8)])
def test_left_to_pytorch_where_it_would_not_pay_or_not_fit(shape, counted, monkeypatch):
    monkeypatch.setattr(winograd, "FEWEST_CHANNEL_TILES", 4096)
    conv = Conv3x3(shape[1], 128)
    x = torch.randn(shape)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
    assert not counted


def test_other_types_and_autocast_are_left_to_pytorch(counted):
    conv = Conv3x3(64, 64)
    x = torch.randn(8, 64, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert conv.double()(x.double()).dtype == torch.float64
    assert not counted
