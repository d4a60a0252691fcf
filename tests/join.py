"""Puts what one run has trained into another's network: `python -m tests.join BASE OTHER OUT [SHARE]`.

A draft and patch attention (`model.draft`, `model.patch_attention`) that started from the same weights can be trained
beside each other, one core each, while everything else stays as it is. OUT is BASE with what OTHER trained.

With a SHARE from 0 to 1, OUT is so far on the straight way from BASE to OTHER, a run that started from it, but for its
draft, which is BASE's: a run that went too far in one respect has gone less far there (Wortsman et al., "Robust
fine-tuning of zero-shot models", arXiv 2109.01903).
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

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


def mix(base: Path, other: Path, out: Path, share: float) -> None:
    """Weights between those of two checkpoints of one network."""
    one, two = load_checkpoint(base), load_checkpoint(other)
    others = two.model.state_dict()
    with torch.no_grad():
        for name, weight in one.model.named_parameters():
            if not name.startswith(ADDED["draft"][0]):
                weight.lerp_(others[name], share)
    save_weights(out, one)


if __name__ == "__main__":
    base, other, out = map(Path, sys.argv[1:4])
    if sys.argv[4:]:
        mix(base, other, out, float(sys.argv[4]))
    else:
        main(base, other, out)
