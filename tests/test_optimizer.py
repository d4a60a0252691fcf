import copy
import math

import pytest
import torch

from fdm_cli.config import load_preset
from fdm_cli.dataset import open_clips
from fdm_cli.errors import BadInput
from fdm_cli.optimizer import ADAMW_SIZE, Muon, orthogonalised
from fdm_cli.trainer import Trainer
from fdm_cli.unet import UNet


def trainer(*overrides: str) -> Trainer:
    config = load_preset("micro", ("training.optimizer=muon", *overrides))
    return Trainer(config, open_clips(config), torch.device("cpu"))


def polynomial(matrix: torch.Tensor) -> torch.Tensor:
    """What `orthogonalised` computes, of singular values."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag_embed() @ vh


@pytest.mark.parametrize("shape", [(32, 288), (128, 32), (96, 96), (3, 32, 32), (1, 7)])
def test_a_step_goes_equally_far_in_all_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    turned = orthogonalised(matrices)
    torch.testing.assert_close(turned.double(), polynomial(matrices), atol=1e-4, rtol=1e-4)
    values = torch.linalg.svdvals(turned)
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_what_is_zero_stays_zero():
    assert not orthogonalised(torch.zeros(2, 32, 64)).any()


@pytest.mark.parametrize("preset", ["micro", "moving-mnist-small", "moving-mnist"])
def test_every_parameter_is_in_one_group_and_matrices_are_hidden_weights(preset):
    with torch.device("meta"):
        model = UNet(load_preset(preset))
    rest, matrices = (group["params"] for group in Muon(model, lr=1e-3).param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(map(id, [*rest, *matrices])) == sorted(names)
    left = {names[id(parameter)] for parameter in rest if parameter.ndim > 1}
    first_and_last = {"input_blocks.0.0.weight", "out.2.weight"}
    assert first_and_last <= left
    added = ("patch_attention.", "draft.", "of_draft.")  # of the draft's layers: below
    own = {name for name in names.values() if not name.startswith(added)}
    assert all("embed_distances" in name or "embedding" in name for name in (left & own) - first_and_last)
    sizes = [parameter.numel() for parameter in matrices if names[id(parameter)] in own]
    assert sum(sizes) > 0.95 * sum(model.get_parameter(name).numel() for name in own)


def test_of_a_draft_the_layers_between_are_matrices():
    sets = ["model.draft=motion", "training.weights=draft"]
    with torch.device("meta"):
        model = UNet(load_preset("moving-mnist-small", sets))
    rest, matrices = (group["params"] for group in Muon(model, lr=1e-3).param_groups)
    names = {id(parameter): name.removeprefix("draft.") for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in rest if parameter.ndim > 1} == {
        "embed.0.weight", "waves", "scale.weight", "shift.weight", "move.weight"
    }  # fmt: skip
    assert {names[id(parameter)] for parameter in matrices} == {
        "embed.2.weight", "of_token.weight", "hidden.weight",
        *(f"layers.{n}.{layer}.weight" for n in range(4) for layer in ("qkv", "out", "mlp.1", "mlp.3")),
    }  # fmt: skip


def test_steps_are_those_of_pytorch_s_muon():
    """Which takes nothing but matrices, and computes in bf16."""
    model = UNet(load_preset("micro"))
    ours = Muon(model, lr=1e-2, weight_decay=0.1)
    layer = model.middle_block[1].spatial_attention.proj_out  # one matrix
    assert any(layer.weight is parameter for parameter in ours.param_groups[1]["params"])
    other = layer.weight.detach().clone().requires_grad_()
    theirs = torch.optim.Muon([other], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    draws = torch.Generator().manual_seed(0)
    for _ in range(4):
        before = other.detach().clone()
        other.grad = torch.randn(other.shape, generator=draws)
        layer.weight.grad = other.grad.clone()
        ours.step()
        theirs.step()
        assert (layer.weight - other).norm() < 0.03 * (other - before).norm()
        with torch.no_grad():
            layer.weight.copy_(other)


def test_a_matrix_moves_by_the_learning_rate_and_the_rest_by_adamw_s_rule():
    mine, plain = (trainer("training.learning_rate=1e-3", f"training.optimizer={name}") for name in ("muon", "adamw"))
    before = {name: value.clone() for name, value in mine.model.state_dict().items()}
    mine.train_step()
    plain.train_step()
    after, others = mine.model.state_dict(), plain.model.state_dict()
    matrices = {id(parameter) for parameter in mine.optimizer.param_groups[1]["params"]}
    for name, parameter in mine.model.named_parameters():
        moved = after[name] - before[name]
        if id(parameter) not in matrices:
            assert torch.equal(after[name], others[name]), name
        elif moved.any():  # not what lies behind weights that begin at zero
            assert 0.5 < moved.square().mean().sqrt() / (1e-3 * ADAMW_SIZE) < 1.3, name


@pytest.mark.slow
def test_the_loss_falls():
    run = trainer("training.learning_rate=1e-3")
    losses = [run.train_step()[0] for _ in range(15)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.slow
def test_state_goes_on_bit_for_bit():
    straight, first, second = trainer(), trainer(), trainer()
    for _ in range(4):
        straight.train_step()
    for _ in range(2):
        first.train_step()
    second.load(first.state())
    for _ in range(2):
        second.train_step()
    for mine, other in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("names", [("adamw", "muon"), ("muon", "adamw")])
def test_the_other_optimizer_s_state_is_refused(names):
    one, other = (trainer(f"training.optimizer={name}") for name in names)
    one.train_step()
    with pytest.raises(BadInput, match="optimizer does not fit"):
        other.load(one.state())


EDITS = {
    "too short": lambda state, _: state["state"][3].update(exp_avg=torch.zeros(1)),
    "no tensor": lambda state, _: state["state"][3].update(exp_avg=7),
    "whole numbers": lambda state, _: state["state"][3].update(
        exp_avg=torch.zeros_like(state["state"][3]["exp_avg"]).long()
    ),
    "missing": lambda state, _: state["state"][3].pop("exp_avg"),
    "one more": lambda state, _: state["state"][3].update(max_exp_avg_sq=torch.zeros(1)),
    "no parameter's": lambda state, _: state["state"].pop(3),
    "no moments": lambda state, _: state["state"].update({3: 5}),
    "no state": lambda state, _: state.update(state=[]),
    "steps": lambda state, _: state["state"][3].update(step=torch.tensor(-1.0)),
    "scaler": lambda _, scaler: scaler.pop("scale"),
}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("how", EDITS)
@pytest.mark.slow
def test_moments_that_do_not_fit_are_refused(name, how):
    """The fused kernel of AdamW would write where it should not."""
    run = trainer(f"training.optimizer={name}", "training.precision=fp16")
    run.train_step()
    state = copy.deepcopy(run.state())
    EDITS[how](state["optimizer"], state["scaler"])
    with pytest.raises(BadInput, match="optimizer does not fit"):
        run.load(state)


@pytest.mark.slow
def test_settings_are_the_configuration_s_and_moments_are_copies():
    first, second = trainer(), trainer()
    first.train_step()
    state = copy.deepcopy(first.state())
    for group in state["optimizer"]["param_groups"]:
        group.update(maximize=True, amsgrad=True, weight_decay=0.5, betas=(1, 1))
    second.load(state)
    for values in state["optimizer"]["state"].values():
        for tensor in values.values():
            tensor.fill_(math.nan)
    assert all(map(math.isfinite, second.train_step()))
    first.train_step()
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


@pytest.mark.slow
def test_fp16_skips_what_overflows():
    run = trainer("training.precision=fp16")
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.scaler._init_scale = 2.0**60
    run.train_step()
    assert all(map(torch.equal, run.model.parameters(), before))
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 1024.0})
    run.train_step()
    assert not any(map(torch.equal, list(run.model.out.parameters()), before[-2:]))
