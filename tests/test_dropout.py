import pytest
import torch

from fdm_cli.dropout import Dropout


def channels_last(*shape: int) -> torch.Tensor:
    return torch.ones(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_the_asked_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    y = Dropout(p)(channels_last(8, 32, 33, 31))
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.005)
    assert float(y.mean()) == pytest.approx(1, abs=0.03)
    assert float(y.max()) == pytest.approx(1 / (1 - p), rel=1e-3)


def test_no_position_or_channel_is_favoured():
    torch.manual_seed(0)
    kept = (Dropout(0.3)(channels_last(64, 32, 8, 8)) != 0).float()
    for dims in ((0, 2, 3), (0, 1, 3), (1, 2, 3)):
        assert kept.mean(dims).sub(0.7).abs().max() < 0.05


def test_the_gradient_passes_where_the_number_did():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.4)(x)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad * x, y)


def test_draws_belong_to_the_global_seed_and_rest_in_evaluation():
    dropout, x = Dropout(0.5), torch.randn(5, 7)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(dropout(x), first)
    assert dropout.eval()(x) is x
