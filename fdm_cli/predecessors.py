"""Checkpoints of the two earlier implementations, the seed's and the authors'.

Both networks are the one in `unet.py`, weight for weight, so their files are read by renaming keys and by
translating the configuration. What this network cannot be is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fdm_cli import config as configuration
from fdm_cli import seed_config, yaml_file
from fdm_cli.config import Config
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput

Weights = dict[str, Tensor]

_SEED_NETWORK = "_score_network."
_SEED_UNUSED = ("_projections.", "_context_transformers.")  # weights that its network never calls

# What the official code's image_size implies (the authors' script_util).
_OFFICIAL_CHANNEL_MULT = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}
# Settings of the official code that change the network or the process, and the only value that is read.
_OFFICIAL_FIXED = {
    "learn_sigma": False,
    "class_cond": False,
    "use_rpe_net": True,
    "use_scale_shift_norm": True,
    "num_heads_upsample": -1,
    "timestep_respacing": "",
}


def is_seed(content: Mapping[str, Any]) -> bool:
    """Whether a loaded file is a checkpoint of the seed implementation."""
    return {"model_state_dict", "config"} <= content.keys()


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a loaded file is a checkpoint of the authors' code."""
    return {"state_dict", "config"} <= content.keys()


def read_seed(content: Mapping[str, Any], name: str) -> tuple[Config, Weights]:
    """Configuration and network weights of a seed checkpoint.

    Raises:
        BadInput: a setting that this network does not have; betas that are not those of the configuration.
    """
    state = _tensors(content["model_state_dict"], name)
    config = configuration.from_node(
        seed_config.translate(yaml_file.from_plain(content["config"], name), to_train=False)
    )
    process = Process(config.diffusion)
    for key, expected in (("betas", process.betas), ("alphas_cumprod", process.alphas_cumprod)):
        stored = state.get(f"_noise_scheduler.{key}")
        if stored is not None and not (
            stored.shape == expected.shape and torch.allclose(stored.double(), expected, atol=1e-6)
        ):
            raise BadInput(f"{name}: its {key} are not those that its configuration says")
    weights = {key.removeprefix(_SEED_NETWORK): value for key, value in state.items() if key.startswith(_SEED_NETWORK)}
    return config, {key: value for key, value in weights.items() if not key.startswith(_SEED_UNUSED)}


def read_official(content: Mapping[str, Any], name: str) -> tuple[Config, Weights]:
    """Configuration and network weights of a checkpoint of the authors' code.

    Raises:
        BadInput: a setting that this network does not have.
    """
    weights = _tensors(content["state_dict"], name)
    settings = yaml_file.from_plain(content["config"], name).plain()
    if not isinstance(settings, dict):
        raise BadInput(f"{name}: its configuration is no set of settings")
    for key, value in _OFFICIAL_FIXED.items():
        if settings.get(key, value) != value:
            raise BadInput(
                f"{name}: was trained with {key}={settings[key]}",
                f"only {key}={'empty' if value == '' else value} is read",
            )
    try:
        size, width = settings["image_size"], settings["num_channels"]
        resolutions = [int(text) for text in str(settings["attention_resolutions"]).split(",")]
        first = weights["input_blocks.0.0.weight"]
        data = {
            # Their clips are not part of the file; --data names some when it is trained on.
            "data": {"source": settings["dataset"], "clip_length": max(settings.get("T", -1), settings["max_frames"])},
            "model": {
                "image_size": size,
                "image_channels": first.shape[1] - 1,
                "window": settings["max_frames"],
                "model_channels": width,
                "num_res_blocks": settings["num_res_blocks"],
                "channel_mult": list(_OFFICIAL_CHANNEL_MULT[size]),
                "attention_resolutions": resolutions,
                "num_heads": settings["num_heads"],
                "dropout": settings["dropout"],
            },
            "diffusion": {
                "timesteps": settings["diffusion_steps"],
                "betas": settings["noise_schedule"],
                "parameterization": "x_0" if settings.get("predict_xstart") else "eps",
                "rescale_timesteps": bool(settings.get("rescale_timesteps", True)),
            },
        }
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise BadInput(f"{name}: its configuration is not the authors': {type(error).__name__} {error}") from None
    return configuration.from_dict(data, name), weights


def are_weights(state: Any) -> bool:
    """Whether this is a dict of tensors by their names."""
    return isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def _tensors(state: Any, name: str) -> Weights:
    if not are_weights(state):
        raise BadInput(f"{name}: its weights are not a set of named tensors")
    return dict(state)
