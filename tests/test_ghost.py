import copy
import resource
import types
import weakref

import pytest
import torch
from torch import nn

from fdm_cli.ghost import Ghost, Ledger, empty, haunt


def test_a_ghost_takes_no_memory_and_its_bytes_are_counted():
    ledger = Ledger()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = empty(ledger, 1000, 1000, 1000)
    assert ledger.alive == 4 * 10**9
    y = x.relu()
    assert ledger.alive == 8 * 10**9
    view = y.view(1000, -1)[3:].t()
    del y
    assert ledger.alive == 8 * 10**9  # a view keeps the whole
    del view, x
    assert ledger.alive == 0
    assert max(ledger.history) == 8 * 10**9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_no_python_runs_when_a_ghost_goes():
    """A signal's handler would run in it, and what that raises would be lost."""
    x = empty(Ledger(), 10)
    callbacks = [reference.__callback__ for reference in weakref.getweakrefs(x.meta.untyped_storage())]
    assert [callback for callback in callbacks if isinstance(callback, types.FunctionType | types.MethodType)] == []
    assert any(callbacks)


def test_changing_in_place_takes_nothing():
    ledger = Ledger()
    x = empty(ledger, 10)
    alive = ledger.alive
    assert x.add_(1) is x
    x.t_()
    torch._foreach_mul_([x], 2.0)
    assert ledger.alive == alive


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.reshape(6, 4).contiguous(),
        lambda x: torch.cat([x, x], dim=1),
        lambda x: x.to(torch.bfloat16),
        lambda x: x.permute(2, 0, 1).clone(),
        lambda x: (x @ x.transpose(1, 2)).softmax(-1),
        lambda x: torch.einsum("abc,adc->bad", x, x),
        lambda x: torch.stack(torch._foreach_norm([x, x])),
        lambda x: x[torch.tensor([1, 0, 1])],
        lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    ],
)
def test_shapes_strides_and_types_are_those_of_real_tensors_again_and_again(make):
    ledger, real = Ledger(), make(torch.rand(2, 3, 4))
    for _ in range(2):  # the second time from what was kept
        ghost = make(empty(ledger, 2, 3, 4))
        assert isinstance(ghost, Ghost)
        assert (ghost.shape, ghost.stride(), ghost.dtype) == (real.shape, real.stride(), real.dtype)


def test_a_step_of_training_counts_weights_gradients_and_what_is_kept_between():
    ledger = Ledger()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100, 200, bias=False), nn.ReLU(), nn.Linear(200, 1, bias=False))
    haunt(model, ledger)
    weights = 4 * (100 * 200 + 200)
    assert ledger.alive == weights
    x = empty(ledger, 50, 100)
    batch = 4 * 50 * 100
    y = model(x)
    # The hidden activations are kept once, after the ReLU, for two layers; before it they are not needed.
    assert ledger.alive == weights + batch + 4 * 50 * 200 + 4 * 50
    y.sum().backward()
    del y
    assert ledger.alive == 2 * weights + batch
    twin = copy.deepcopy(model)
    assert isinstance(twin[0].weight, nn.Parameter)
    assert ledger.alive == 3 * weights + batch


def test_what_would_need_a_number_fails():
    with pytest.raises(RuntimeError):
        float(empty(Ledger(), 1))
