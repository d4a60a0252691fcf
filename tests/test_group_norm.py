import pytest
import torch
import torch.nn.functional as F

from fdm_cli.group_norm import LARGE, group_norm, group_norm_linear, group_norm_of


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("own_scale", [False, True])
@pytest.mark.parametrize("size", [20, 100, LARGE])
def test_statistics_of_a_frame_are_those_of_pytorch(silu, own_scale, size):
    x = torch.randn(3, size, 1, 32, dtype=torch.float64) * 3 + 2
    scale, shift = (torch.randn(*((3, 32) if own_scale else (32,)), dtype=torch.float64) for _ in range(2))
    expected = F.group_norm(x[:, :, 0].transpose(1, 2), 8).transpose(1, 2)[:, :, None]
    expected = expected * scale.view(-1, 1, 1, 32) + shift.view(-1, 1, 1, 32)
    torch.testing.assert_close(group_norm(x, scale, shift, 8, silu), F.silu(expected) if silu else expected)


def test_statistics_of_a_pixel_over_time():
    x = torch.randn(2, 6, 5, 32, dtype=torch.float64)
    ones, zeros = torch.ones(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    expected = F.group_norm(x.permute(0, 2, 3, 1).reshape(10, 32, 6), 8)
    expected = expected.reshape(2, 5, 32, 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(group_norm(x, ones, zeros, 8), expected)


def test_statistics_of_some_frames_are_those_without_the_others():
    x = torch.randn(2, 6, 5, 32, dtype=torch.float64) * 3 + 2
    scale, shift = torch.randn(2, 32, dtype=torch.float64)
    counted = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    some = group_norm_of(x, scale, shift, 8, counted)
    torch.testing.assert_close(some[:1, :4], group_norm(x[:1, :4].contiguous(), scale, shift, 8))
    torch.testing.assert_close(some[1:], group_norm(x[1:], scale, shift, 8))
    half = x.bfloat16()
    made = group_norm_of(half, scale.float(), shift.float(), 8, counted)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.double(), group_norm_of(half.double(), scale, shift, 8, counted), atol=0, rtol=2e-2)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("size", [(3, 4), (6, 1)])
@pytest.mark.parametrize("large", [1, 1000])
def test_gradients(silu, rows, size, large, monkeypatch):
    """After PyTorch's kernel, or after the formula."""
    monkeypatch.setattr("fdm_cli.group_norm.LARGE", large)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, *size, 8), (rows, 8), (rows, 8))
    ]
    assert torch.autograd.gradcheck(lambda x, scale, shift: group_norm(x, scale, shift, 4, silu), inputs)


@pytest.mark.parametrize("size", [(3, 4), (100, 1)])
@pytest.mark.slow
def test_with_a_linear_layer(size):
    shapes = ((2, *size, 8), (8,), (8,), (5, 8), (5,))
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def both(x, scale, shift, weight, bias):
        return group_norm_linear(x, scale, shift, 4, weight, bias)

    assert torch.autograd.gradcheck(both, inputs)
    x, scale, shift, weight, bias = inputs
    normed = group_norm(x, scale, shift, 4)
    torch.testing.assert_close(both(*inputs), (normed, torch.nn.functional.linear(normed, weight, bias)))


def test_a_linear_layer_keeps_no_normalised_map():
    x, ones = torch.randn(2, 100, 1, 32, requires_grad=True), torch.ones(32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        group_norm_linear(x, ones, ones, 8, torch.randn(96, 32, requires_grad=True), ones.new_zeros(96))
    assert {value.data_ptr() for value in kept if value.shape == x.shape} == {x.data_ptr()}


def test_a_linear_layer_in_half_precision():
    x = torch.randn(2, 64, 1, 32).bfloat16().requires_grad_()
    parameters = [torch.randn(*shape, requires_grad=True) for shape in ((32,), (32,), (96, 32), (96,))]
    same = [value.detach().float().requires_grad_() for value in (x, *parameters)]
    with torch.autocast("cpu", torch.bfloat16):
        _, z = group_norm_linear(x, *parameters[:2], 8, *parameters[2:])
    _, expected = group_norm_linear(*same[:3], 8, *same[3:])
    weight = torch.randn(z.shape)
    (z.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (z.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    for mine, other in zip((x, *parameters), same, strict=True):
        assert mine.grad.dtype == mine.dtype
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.float(), other.grad, rtol=0.03, atol=0.03 * scale)


@pytest.mark.parametrize("size", [16, 100, LARGE])
def test_only_a_cpu_has_a_kernel_for_maps_with_the_channels_last(size, monkeypatch):
    def refuse(*_):
        raise AssertionError("called on another device")

    monkeypatch.setattr(torch, "native_group_norm", refuse)
    x = torch.randn(2, size, 1, 32, device="meta", requires_grad=True)
    scale, shift = (torch.randn(32, device="meta", requires_grad=True) for _ in range(2))
    group_norm(x, scale, shift, 8, silu=True).sum().backward()
    assert (x.grad.shape, scale.grad.shape) == (x.shape, scale.shape)


def test_a_constant_map_is_no_division_by_zero():
    x = torch.full((1, 4, 1, 32), 3.0, requires_grad=True)
    ones = torch.ones(32)
    y = group_norm(x, ones, ones, 8, silu=True)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("size", [(20, 1), (100, 1), (LARGE, 1), (16, 5)])
def test_half_precision_maps_with_single_precision_statistics(dtype, rows, size):
    x = (torch.randn(2, *size, 32) + 30).to(dtype).requires_grad_()  # far from zero: its squares would lose everything
    scale, shift = (torch.randn(rows, 32, requires_grad=True) for _ in range(2))
    weight = torch.randn(x.shape)
    same = [value.detach().float().requires_grad_() for value in (x, scale, shift)]
    y, expected = group_norm(x, scale, shift, 8, silu=True), group_norm(*same, 8, silu=True)
    (y.float() * weight).sum().backward()
    (expected * weight.to(dtype).float()).sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype))
    for mine, other in zip((x, scale, shift), same, strict=True):
        torch.testing.assert_close(mine.grad.float(), other.grad, rtol=0.02, atol=0.02 * other.grad.abs().max().item())
