"""`torch.compile` for the blocks of the network, one by one.

How many frames a block computes differs from call to call, with the number of latent frames. Compiled as a whole, the
network would be compiled anew for each; compiled block by block, with that number left open, a few graphs serve all
calls, and blocks of equal shapes share them. What depends on the content of masks stays outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fdm_cli.attention import SpatialAttention, TemporalAttention
from fdm_cli.blocks import Conditions, ResidualBlock
from fdm_cli.errors import RunFailed
from fdm_cli.unet import UNet

MOST_GRAPHS = 64  # of one kind of block; PyTorch's 8 are too few for a network of four resolutions


def compile_blocks(model: UNet) -> None:
    """Has the residual blocks and attentions compiled, each when it is called for the first time.

    Copies of the network made afterwards would share the original's weights: make them before.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for module in model.modules():
        if isinstance(module, ResidualBlock | TemporalAttention | SpatialAttention):
            module.forward = _compiled(module.forward)  # type: ignore[method-assign]


def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    graph = torch.compile(forward, dynamic=False)

    def call(x: Tensor, *arguments: object) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        for argument in arguments:
            if isinstance(argument, Conditions):
                torch._dynamo.maybe_mark_dynamic(argument.clip_of_frame, 0)
        return graph(x, *arguments)

    return call


@contextmanager
def explained(hint: str) -> Iterator[None]:
    """What the compiler cannot do becomes one line.

    Args:
        hint: how to do without it.

    Raises:
        RunFailed: instead of an error of the compiler.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason, _, _ = str(error).partition("\n\n")  # then comes advice for PyTorch's developers
            raise RunFailed(f"torch.compile failed: {reason[:300]}", hint) from error
        raise
