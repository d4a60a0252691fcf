"""Checkpoints with random weights, and the figures that the predecessors' own programs computed with them.

`seed-micro` lives in tests/data. `seed-small` and `fdm-official` are in the folder that the environment variable
FDM_REFERENCE names, else in `shared/reference` inside the repository or a folder above it; without it their tests
are skipped.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracle import OracleUNet

DATA = Path(__file__).parent / "data"


def _find_reference() -> Path:
    if "FDM_REFERENCE" in os.environ:
        return Path(os.environ["FDM_REFERENCE"])
    places = [folder / "shared" / "reference" for folder in Path(__file__).resolve().parents[1:]]
    return next((place for place in places if place.is_dir()), places[0])


REFERENCE = _find_reference()
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no folder of reference figures (FDM_REFERENCE)")

SEED = ["seed-micro", pytest.param("seed-small", marks=needs_reference)]
OFFICIAL = [pytest.param("fdm-official", marks=needs_reference)]
GOLDEN = SEED + OFFICIAL

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "seed-micro": {
        "image_channels": 1,
        "image_size": 8,
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1,),
        "attention_resolutions": (8,),
        "num_heads": 2,
        "dropout": 0.1,
    },
    "seed-small": {
        "image_channels": 1,
        "image_size": 16,
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1, 2),
        "attention_resolutions": (8,),
        "num_heads": 2,
        "dropout": 0.1,
    },
    "fdm-official": {
        "image_channels": 3,
        "image_size": 32,
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1, 2, 2, 2),
        "attention_resolutions": (16, 8),
        "num_heads": 4,
        "dropout": 0.0,
    },
    # The two that are timed; there are no weights for them.
    "seed-preset": {
        "image_channels": 1,
        "image_size": 32,
        "model_channels": 128,
        "num_res_blocks": 2,
        "channel_mult": (1, 2, 2, 2),
        "attention_resolutions": (16, 8),
        "num_heads": 4,
        "dropout": 0.1,
    },
    "seed-preset-32": {
        "image_channels": 1,
        "image_size": 32,
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1, 2, 2, 2),
        "attention_resolutions": (16, 8),
        "num_heads": 4,
        "dropout": 0.1,
    },
}


def reference_file(name: str) -> Path:
    """Where a reference file such as `seed-micro.pt` lies."""
    return (DATA if name.startswith("seed-micro") else REFERENCE) / name


def golden(name: str) -> dict[str, Tensor]:
    """The figures of `<name>.npz`: videos (B, K, C, H, W), chain_noise (T, B, K, C, H, W), masks (B, K) bool."""
    figures = {}
    with np.load(reference_file(f"{name}.npz")) as arrays:
        for key, array in arrays.items():
            values = torch.from_numpy(array)
            if key.endswith("_mask"):
                values = values.flatten(1).bool()
            elif values.ndim >= 5 and name.startswith("seed"):
                values = values.transpose(-4, -3).contiguous()
            figures[key] = values
    return figures


def checkpoint(name: str) -> dict[str, Any]:
    """The dictionary in `<name>.pt`, as the predecessor saved it."""
    return torch.load(reference_file(f"{name}.pt"), map_location="cpu", weights_only=True)


def network_weights(name: str) -> dict[str, Tensor]:
    """The network's weights under their official names.

    The seed puts `_score_network.` before them and adds `_projections` and `_context_transformers`, which its
    network never uses.
    """
    saved = checkpoint(name)
    if "state_dict" in saved:
        return dict(saved["state_dict"])
    prefix = "_score_network."
    weights = {key.removeprefix(prefix): w for key, w in saved["model_state_dict"].items() if key.startswith(prefix)}
    return {key: w for key, w in weights.items() if not key.startswith(("_projections.", "_context_transformers."))}


def network_timestep(name: str, timestep: Tensor) -> Tensor:
    """What the network is fed: timestep * 1000 / T in the official code, the integer itself in the seed."""
    if name.startswith("seed"):
        return timestep
    return timestep * (1000 / checkpoint(name)["config"]["diffusion_steps"])


def oracle(name: str) -> OracleUNet:
    """The oracle with the weights of `<name>.pt`, in eval mode."""
    network = OracleUNet(**ARCHITECTURES[name])
    network.load_state_dict(network_weights(name))
    return network.eval()
