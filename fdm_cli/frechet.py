"""Frechet video distance (Unterthiner et al., arXiv 1812.01717), with a feature network that the user brings.

The network is a TorchScript file with the interface of the I3D that StyleGAN-V (arXiv 2112.14683) and many others use:
called as `network(videos, rescale=False, resize=False, return_features=True)` it takes float32 videos
(B, 3, N, 224, 224) in [-1, 1] and gives one row of features a video, (B, F): 400 of that I3D, before its softmax.
Frames are brought to 224 x 224 here, bilinearly (`align_corners=False`), grey ones as three equal channels.

The distance of few videos is much larger than that of many: compare figures only of equal numbers of videos and frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdm_cli.errors import BadInput

SIDE = 224  # pixels


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians that fit two sets of features.

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), with covariances over n - 1. With the centred features X_i,
    C_i = X_i^T X_i / (n_i - 1), the last trace is the sum of the singular values of X_1 X_2^T, divided by
    sqrt((n_1 - 1) (n_2 - 1)): exact however few features there are, where a matrix square root is not.

    Args:
        features: (n_1, F), n_1 at least 2.
        others: (n_2, F), n_2 at least 2.

    Raises:
        ValueError: fewer than two rows, or rows of different lengths.
    """
    if min(len(features), len(others)) < 2 or features.shape[1:] != others.shape[1:]:
        raise ValueError(f"features {tuple(features.shape)} and {tuple(others.shape)}")
    x, y = features.double(), others.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = (x - mean_x) / (len(x) - 1) ** 0.5, (y - mean_y) / (len(y) - 1) ** 0.5
    common = torch.linalg.svdvals(x @ y.T).sum()
    distance = (mean_x - mean_y).square().sum() + x.square().sum() + y.square().sum() - 2 * common
    return max(float(distance), 0.0)


class VideoFeatures:
    """The user's network; see the module's docstring.

    TorchScript is a program: load only files from those you trust.

    Args:
        path: the TorchScript file.
        device: where it runs.

    Raises:
        BadInput: no TorchScript file.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if path.is_dir():
            raise BadInput(f"{path} is a folder, not a TorchScript file")
        if not path.is_file():
            raise BadInput(f"no such file: {path}", "--fvd-weights takes a TorchScript file, e.g. i3d_torchscript.pt")
        try:
            self._network: Any = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever a file that is none makes torch raise
            reason = " ".join(str(error).split())[:150]
            raise BadInput(f"{path}: no TorchScript file: {reason}", "torch.jit.save writes them") from None
        self._path = path
        self._device = device
        self._count: int | None = None  # of features, once known

    @torch.inference_mode()
    def __call__(self, video: Tensor) -> Tensor:
        """The features (F,) of one video (N, C, H, W) in [0, 1].

        Raises:
            BadInput: the network cannot be called in that way, or gives something else.
        """
        frames = F.interpolate(video.to(self._device) * 2 - 1, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        batch = frames.expand(-1, 3, -1, -1).transpose(0, 1)[None].contiguous()
        try:
            features = self._network(batch, rescale=False, resize=False, return_features=True)
        except Exception as error:  # whatever the user's program raises
            reason = " ".join(str(error).split())[-200:]
            raise BadInput(
                f"{self._path}: fails on a video (1, 3, {len(video)}, {SIDE}, {SIDE}): {reason}",
                "it is called with rescale=False, resize=False, return_features=True",
            ) from None
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 1:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise BadInput(f"{self._path}: gives {found}, not a row of features for one video")
        if not features.isfinite().all():
            raise BadInput(f"{self._path}: gives features that are not finite")
        count = features.shape[1]
        if not count or count != (self._count or count):
            raise BadInput(f"{self._path}: gives {self._count or 'some'} features for one video, {count} for another")
        self._count = count
        return features[0].cpu().double()
