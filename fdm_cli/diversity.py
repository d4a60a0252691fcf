"""Which frames a window looks at, chosen while the video is made: those that look least like each other.

The adaptive schemes of FDM (arXiv 2205.11495, appendix on adaptive schemes) observe frames that differ. Every known
frame is a point in an embedding; the window starts from frames that the scheme names and takes, again and again, the
frame whose distance to the nearest one taken is largest (farthest-point selection, Gonzalez 1985).

A frame is embedded once, when it first may be chosen, and its embedding stays in memory: half a kilobyte (`pixels`)
or two (`lpips`). One window's choice of n among F known frames takes n passes over F points: the distance to the
nearest frame taken is kept and only ever lowered.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fdm_cli.errors import BadInput, did_you_mean, not_numbers
from fdm_cli.plan import Plan

EMBEDDINGS = ("pixels", "lpips")
BLOCK = 4096  # points whose distances are computed at once

Vector = NDArray[np.float32]


class Embedding(Protocol):
    """A frame as a point; Euclidean distance says how different two frames look."""

    size: int

    def __call__(self, frame: Tensor) -> Vector:
        """(C, H, W) in [-1, 1] -> (size,) float32. The same frame gives the same bits, whatever was embedded before."""


class Frames(Protocol):
    """Where the frames are."""

    def get(self, index: int, sample: int) -> Tensor:
        """One frame of one sample, (C, H, W) in [-1, 1]."""


class PixelEmbedding:
    """How a frame looks from a distance: blurred brightness, blurred colour, and how much edge there is where.

    Needs no weights. The numbers of a frame, 128 in all:

    - brightness (the mean of the channels), averaged over the cells of an 8 x 8 grid: 64
    - its absolute differences between neighbours, across and down, averaged over a 4 x 4 grid: 2 x 16
    - the first and the last channel minus the brightness, averaged over a 4 x 4 grid: 2 x 16; 0 of a grey video

    Each number is divided by the square root of the cells of its grid, so that the squared distance of two frames is a
    sum of mean squared differences; edges are small numbers, and count four times.
    """

    size = 128

    def __call__(self, frame: Tensor) -> Vector:
        """(C, H, W) in [-1, 1] -> (128,) float32."""
        frame = frame.detach().to("cpu", torch.float64)[None]
        brightness = frame.mean(1, keepdim=True)
        across = functional.pad(brightness.diff(dim=3).abs(), (0, 1))
        down = functional.pad(brightness.diff(dim=2).abs(), (0, 0, 0, 1))
        pool = functional.adaptive_avg_pool2d
        parts = [
            pool(brightness, 8) / 8,
            pool(torch.cat([across, down], 1), 4) * (2 / 4),
            pool(frame[:, [0, -1]] - brightness, 4) / 4,
        ]
        return torch.cat([part.flatten() for part in parts]).numpy().astype(np.float32)


class LpipsEmbedding:
    """LPIPS (arXiv 1801.03924), the distance that the FDM authors use, as points of 512 numbers.

    LPIPS compares the activations of five layers of AlexNet, normalised at each pixel, weighted by channel and
    averaged over pixels: a squared Euclidean distance of very long vectors. They are shortened by a count sketch
    (Charikar et al. 2002): each number is added, with a sign, to one of 512 sums. Squared distances are kept to about
    6 %.

    Args:
        network: an `lpips.LPIPS`: its `scaling_layer`, the backbone `net` and the `lins` that weigh channels are used.
        device: where it runs.
    """

    size = 512

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device

    @classmethod
    def load(cls, device: torch.device) -> LpipsEmbedding:
        """The published weights; torchvision downloads those of AlexNet when they are first used.

        Raises:
            BadInput: the package is not installed, or its weights cannot be had.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision in ways of the past
            try:
                import lpips

                network = lpips.LPIPS(net="alex", verbose=False)
            except ImportError:
                raise BadInput(
                    "the lpips embedding needs the package lpips",
                    "install fdm with its extra [lpips] and the torchvision of your torch, or take --embedding pixels",
                ) from None
            except Exception as error:  # whatever the download, or a torchvision for another torch, raises
                raise BadInput(
                    f"lpips cannot be loaded: {' '.join(str(error).split())[:200]}",
                    "it downloads weights once, and needs the torchvision of this torch; or --embedding pixels",
                ) from error
        return cls(network, device)

    @torch.inference_mode()
    def __call__(self, frame: Tensor) -> Vector:
        """(C, H, W) in [-1, 1] -> (512,) float32. Frames under 64 pixels are enlarged: AlexNet needs some size."""
        image = frame.detach().to(self.device, torch.float32)[None].expand(-1, 3, -1, -1)
        if min(image.shape[2:]) < 64:
            image = functional.interpolate(image, size=(64, 64), mode="bilinear", align_corners=False)
        sums = torch.zeros(self.size, dtype=torch.float64)
        layers = self.network.net.forward(self.network.scaling_layer(image))
        for number, (layer, weigh) in enumerate(zip(layers, self.network.lins, strict=True)):
            unit = layer / (layer.norm(dim=1, keepdim=True) + 1e-10)
            weights = weigh.model[-1].weight.clamp(min=0).sqrt()  # (1, C, 1, 1); the distance weighs squares
            values = (unit * weights / (layer.shape[2] * layer.shape[3]) ** 0.5).flatten().cpu().double()
            bucket, sign = _sketch(len(values), self.size, number)
            sums.index_add_(0, bucket, values * sign)
        return sums.numpy().astype(np.float32)


def _sketch(length: int, buckets: int, seed: int) -> tuple[Tensor, Tensor]:
    """For each number the sum it goes to and its sign; always the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    bucket = torch.randint(buckets, (length,), generator=generator)
    return bucket, torch.randint(2, (length,), generator=generator).double() * 2 - 1


def check_embedding(name: str) -> None:
    """BadInput for a name that is not `pixels` or `lpips`."""
    if name not in EMBEDDINGS:
        raise BadInput(f"unknown embedding {name!r}", did_you_mean(name, EMBEDDINGS))


def make_embedding(name: str, device: torch.device) -> Embedding:
    """The embedding of a name: `pixels`, which needs nothing, or `lpips`. BadInput for any other."""
    check_embedding(name)
    return PixelEmbedding() if name == "pixels" else LpipsEmbedding.load(device)


def farthest(points: Vector, taken: Sequence[int], count: int, prefer: NDArray[np.int64] | None = None) -> list[int]:
    """Farthest-point selection: `count` rows, each the farthest from all taken before it.

    Args:
        points: (F, D) float32.
        taken: rows to start from; not chosen again. With none, the first choice is the most preferred row.
        count: how many to choose; at most F - len(taken).
        prefer: (F,) a number for each row; of equally far rows the one with the lowest number is chosen. The row's
            own number when not given.

    Returns:
        the rows, in the order in which they were chosen. Work: O(F D) a choice; memory: O(F) besides the points.
    """
    order = np.arange(len(points)) if prefer is None else prefer
    nearest = np.full(len(points), np.inf, np.float32)  # squared distance to the nearest row taken
    chosen: list[int] = []

    def take(row: int) -> None:
        for start in range(0, len(points), BLOCK):
            block = slice(start, start + BLOCK)
            np.minimum(nearest[block], np.square(points[block] - points[row]).sum(1), out=nearest[block])
        nearest[row] = -1  # and so it stays

    for row in taken:
        take(row)
    while len(chosen) < count:
        ties = np.flatnonzero(nearest == nearest.max())
        row = int(ties[order[ties].argmin()])
        if nearest[row] < 0:
            raise ValueError(f"{count} rows wanted of {len(points)}, of which {len(taken)} are taken")
        chosen.append(row)
        take(row)
    return chosen


class Diversity:
    """Chooses the observed frames of a plan's stages, sample by sample, as they are run.

    The rows of a sample's points stand in the order in which frames become known: the given ones, then stage after
    stage. What a stage may choose from (`Choice.among`) is then always the first so many rows.

    Args:
        plan: the plan that is executed.
        embedding: see `make_embedding`.
        samples: S, videos made side by side.
    """

    def __init__(self, plan: Plan, embedding: Embedding, samples: int) -> None:
        self.plan = plan
        self.embedding = embedding
        self._frames = array("q", plan.given_frames)
        self._known_after = array("q", [len(self._frames)])  # the first s stages -> known frames
        for stage in plan.stages:
            self._frames.extend(stage.latent)
            self._known_after.append(len(self._frames))
        self._row = array("q", [0]) * plan.length
        for row, frame in enumerate(self._frames):
            self._row[frame] = row
        self._points = [np.zeros((plan.length, embedding.size), np.float32) for _ in range(samples)]
        self._embedded = [0] * samples

    def choose(self, number: int, sample: int, frames: Frames) -> tuple[int, ...]:
        """The frames that a stage of the plan observes, sorted: what its `Choice` always takes, and the farthest.

        Args:
            number: the stage; one with a `choice`.
            sample: which video.
            frames: holds all that the stage may choose from.

        Raises:
            RunFailed: a frame is not finite.
        """
        stage = self.plan.stages[number]
        choice = stage.choice
        if choice is None:
            raise ValueError(f"stage {number} has nothing to choose")
        points = self._points[sample]
        known = self._known_after[choice.among]
        for row in range(self._embedded[sample], known):
            points[row] = self.embedding(frames.get(self._frames[row], sample))
            if not np.isfinite(points[row]).all():
                raise not_numbers()
        self._embedded[sample] = max(known, self._embedded[sample])
        always = [self._row[frame] for frame in choice.always]
        more = stage.observed_count - len(always)
        rows = farthest(points[:known], always, more, np.frombuffer(self._frames, np.int64)[:known])
        return tuple(sorted((*choice.always, *(self._frames[row] for row in rows))))
