"""Puts what one run has trained into another's network: `python -m tests.join BASE OTHER OUT`.

A draft and patch attention (`model.draft`, `model.patch_attention`) that started from the same weights can be trained
beside each other, one core each, while everything else stays as it is. OUT is BASE with what OTHER trained.
"""

import sys
from dataclasses import replace
from pathlib import Path

from fdm_cli.checkpoint import load_checkpoint, save_weights
from fdm_cli.trainer import ADDED
from fdm_cli.unet import UNet


def main(base: Path, other: Path, out: Path) -> None:
    """Joins two checkpoints."""
    one, two = load_checkpoint(base), load_checkpoint(other)
    part = two.config.training.weights
    model = replace(one.config.model, **{part: getattr(two.config.model, part)})
    config = replace(one.config, model=model, training=replace(one.config.training, weights="all"))
    taken = {key: value for key, value in two.model.state_dict().items() if key.startswith(ADDED[part])}
    network = UNet(config)
    network.load_state_dict({**one.model.state_dict(), **taken})
    save_weights(out, replace(one, config=config, model=network, step=0))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
