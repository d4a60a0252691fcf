"""Small networks for tests."""

import torch

# The smallest one there is: a step takes a few hundredths of a second.
SMALLEST = ["model.image_size=8", "model.window=4", "data.clip_length=4", "model.channel_mult=[1]",
            "model.attention_resolutions=[4]"]  # fmt: skip
SMALLEST_OPTIONS = tuple(word for setting in SMALLEST for word in ("--set", setting))  # of `fdm train`


def randomise(model: torch.nn.Module, std: float = 0.1) -> None:
    """Zero-initialised layers would hide what stands before them."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
