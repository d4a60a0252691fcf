"""The optimizers: AdamW, and Muon, which takes steps of weight matrices that are orthogonal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fdm_cli.config import TrainingConfig
from fdm_cli.unet import UNet

MOMENTUM = 0.95
ITERATIONS = 5
# Of the polynomial a x + b x^3 + c x^5 that singular values go through: five times over, it takes whatever lies within
# 0.002 to 1 to within 0.68 to 1.21. It does not converge to 1, but rises most steeply at 0 (Jordan et al. 2024).
A, B, C = 3.4445, -4.7750, 2.0315
ADAMW_SIZE = 0.2  # root mean square of AdamW's usual steps, at a learning rate of 1


def make(model: UNet, training: TrainingConfig) -> torch.optim.AdamW:
    """The optimizer of a run.

    Args:
        model: a UNet.
        training: optimizer, learning rate, weight decay and epsilon.
    """
    rate, epsilon, decay = training.learning_rate, training.adam_epsilon, training.weight_decay
    if training.optimizer == "muon":
        return Muon(model, lr=rate, eps=epsilon, weight_decay=decay)
    return torch.optim.AdamW(_trained(model), lr=rate, eps=epsilon, weight_decay=decay, fused=True)


def load_moments(optimizer: torch.optim.AdamW, saved: Mapping[str, Any]) -> None:
    """Takes the moments of a saved state, as copies; the settings stay the optimizer's own.

    What does not fit must be found here: PyTorch compares no shapes, and its fused step would write beyond what is
    too small. A run without a finite step has no moments yet.

    Args:
        optimizer: of `make`.
        saved: what its `state_dict` was.

    Raises:
        ValueError: the state is not of these parameters.
    """
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    state = saved.get("state")
    if not isinstance(state, dict) or (state and state.keys() != set(range(len(parameters)))):
        raise ValueError(f"it does not have the moments of {len(parameters)} parameters")
    matrices = set(optimizer.param_groups[1]["params"]) if isinstance(optimizer, Muon) else set()
    copies = {}
    for number, moments in state.items():
        parameter = parameters[number]
        names = ["exp_avg"] if parameter in matrices else ["exp_avg", "exp_avg_sq"]
        if not isinstance(moments, dict) or moments.keys() != {"step", *names}:
            raise ValueError(f"the moments of parameter {number} are others")
        copies[number] = {name: _copied(moments[name], parameter, f"{name} of parameter {number}") for name in names}
        step = _copied(moments["step"], torch.zeros(()), f"step of parameter {number}")
        if not 0 <= float(step) < math.inf:
            raise ValueError(f"parameter {number} has had {float(step)} steps")
        copies[number]["step"] = step
    optimizer.load_state_dict({"state": copies, "param_groups": optimizer.state_dict()["param_groups"]})


def _copied(value: Any, like: Tensor, what: str) -> Tensor:
    """As a tensor of the same memory layout, type and device as another."""
    if not isinstance(value, Tensor) or value.shape != like.shape or not value.is_floating_point():
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} is {found}, not {list(like.shape)} numbers")
    return torch.empty_like(like, requires_grad=False).copy_(value)


class Muon(torch.optim.AdamW):
    """Momentum whose steps are orthogonalised, for weight matrices; AdamW for everything else.

    Of a matrix W (m, n) with gradient G and learning rate r, decayed by AdamW's rule:

        M <- mu M + (1 - mu) G
        W <- W - r 0.2 sqrt(max(m, n)) orthogonalised(mu M + (1 - mu) G)

    so that a step has the size of one of AdamW's, and learning rates can be taken over (arXiv 2502.16982). All
    directions of a matrix are learnt at one rate, where AdamW follows the few that its gradients have most of.

    Matrices are the weights of convolutions, as (outputs, inputs x places), and of linear layers, queries, keys and
    values being one each; but for the first and the last layer, whose rows or columns are pixels, for patch
    attention, which is all pixels, and for the few inputs of distances' embeddings; of a draft too, the layers between.

    Args:
        model: a UNet.
        lr: of matrices and of the rest.
        eps: AdamW's.
        weight_decay: of matrices and of the rest.
    """

    def __init__(self, model: UNet, lr: float, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        matrices = _matrices(model)
        rest = [parameter for parameter in _trained(model) if parameter not in matrices]
        groups = [{"params": parameters} for parameters in (rest, list(matrices))]
        super().__init__(groups, lr=lr, eps=eps, weight_decay=weight_decay, fused=True)
        self._parts = list(matrices.values())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # AdamW's is overloaded
        """One step of all parameters; the matrices' gradients are used up. Takes no closure."""
        group = self.param_groups[1]
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)  # by shape: turned in one go
        for parameter, parts in zip(group["params"], self._parts, strict=True):
            if parameter.grad is not None:
                matrices = self._momentum(parameter, parameter.grad).reshape(parts, len(parameter) // parts, -1)
                alike[matrices.shape[1:]].append((parameter, matrices))
                parameter.grad = None  # AdamW leaves alone what has none
        while alike:
            shape, those = alike.popitem()
            turned = orthogonalised(torch.cat([matrices for _, matrices in those]))
            for (parameter, _), own in zip(those, torch.split(turned, [len(m) for _, m in those]), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(own.reshape(parameter.shape), alpha=-group["lr"] * ADAMW_SIZE * max(shape) ** 0.5)
        super().step(closure)

    def _momentum(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:  # by AdamW's names, whose way of loading a state asks for `step`; it counts nothing here
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(parameter)
        return gradient.lerp(state["exp_avg"].lerp_(gradient, 1 - MOMENTUM), MOMENTUM)


def _trained(model: UNet) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _matrices(model: UNet) -> dict[Tensor, int]:
    """The parameters that are matrices, each with the number of those that lie one below the other in it."""
    edges = {*model.input_blocks[0].modules(), *model.out.modules()}
    if model.patch_attention is not None:
        edges.update(model.patch_attention.modules())
    if model.draft is not None:
        edges.update([model.of_draft, *model.draft.modules()])
        edges.difference_update(model.draft.inner)
    return {
        module.weight: 3 if name.endswith(".qkv") else 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and module not in edges
        and not name.endswith(".embed_distances")
        and module.weight.requires_grad
    }


def orthogonalised(matrices: Tensor) -> Tensor:
    """About the nearest matrices with orthonormal rows, or columns where those are fewer.

    All powers are taken of the smaller product of a matrix with itself: only two multiplications are by the matrix.

    Args:
        matrices: (..., m, n) float32, of any size but 0.
    """
    matrices = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    wide = matrices.shape[-2] <= matrices.shape[-1]
    gram = matrices @ matrices.mT if wide else matrices.mT @ matrices
    product = factor = _factor(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product @ matrices if wide else matrices @ product


def _factor(gram: Tensor) -> Tensor:
    """What a matrix is multiplied by to apply the polynomial: a + b G + c G^2."""
    factor = (gram @ gram).mul_(C).add_(gram, alpha=B)
    factor.diagonal(dim1=-2, dim2=-1).add_(A)
    return factor
