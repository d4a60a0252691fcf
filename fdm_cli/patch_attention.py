"""Attention of latent frames to the patches of observed ones, in pixels: what has moved is found again and copied.

The factorized network hands on what a thing looks like through maps of few positions, from place to place by spatial
attention and from frame to frame by temporal attention. Of its sharp edges little arrives: a small network draws
something similar anew, and in a long video things turn into others. Here the network's own estimate of a latent frame
asks where its patches occur in the observed frames, at every pixel, as non-local means does (Buades, Coll, Morel,
"A non-local algorithm for image denoising", 2005), and convolutions decide what to make of what was found.

Not in FDM. It starts as the identity, so it can be added to a network that is already trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdm_cli.attention import zero_
from fdm_cli.config import ModelConfig
from fdm_cli.diffusion import Process
from fdm_cli.window import Alike

MARGINS = (2, 4)  # pixels around a block that belong to the patches that are compared: one head for each
FEATURES = 32  # of a patch
WIDTH = 64  # channels of the convolutions
SHARPNESS = 8.0  # at first: a mean squared difference of d, in normalised pixels, leaves exp(-8 d) of the weight


class PatchAttention(nn.Module):
    """Adds to the network's output on latent frames what similar patches of observed frames suggest.

    Of a latent frame every block of pixels asks, with the patch p around it in the estimate of x_0; in observed frames
    the patch q of every pixel answers, so that motion by any number of whole pixels is followed. With a learned linear
    map f of patches for each size of them, and a sharpness s that is learned by timestep:

        found(p) = sum_q softmax_q(-s |f(p) - f(q)|^2) content(q)

    What was found, the estimate, x_t and the output go through four convolutions over the blocks of a frame.

    Args:
        config: of the network.
        embedding: E, channels of the timestep embedding.
        process: makes the estimate.
    """

    def __init__(self, config: ModelConfig, embedding: int, process: Process) -> None:
        super().__init__()
        self.block = config.patch_block
        self.process = process
        channels = config.image_channels
        pixels = channels * self.block**2
        # One feature less than contents have: the last place is taken by the square of the others.
        self.compare = nn.ModuleList(self._of_patches(channels, FEATURES - 1, margin) for margin in MARGINS)
        self.content = self._of_patches(channels, FEATURES, MARGINS[0])
        self.sharpness = nn.Linear(embedding, len(MARGINS))
        zero_(self.sharpness)
        with torch.no_grad():
            sizes = [channels * (self.block + 2 * margin) ** 2 for margin in MARGINS]
            self.sharpness.bias.copy_((SHARPNESS / torch.tensor(sizes)).log())
        self.first = nn.Conv2d(FEATURES * (len(MARGINS) + 2) + pixels, WIDTH, 1)
        self.of_time = nn.Linear(embedding, 2 * WIDTH)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.third = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.last = nn.Conv2d(WIDTH, pixels, 3, padding=1)
        zero_(self.of_time)
        zero_(self.last)

    def _of_patches(self, channels: int, features: int, margin: int) -> nn.Conv2d:
        """A linear map of patches that keeps their distances, or about that where it has fewer features than pixels."""
        size = self.block + 2 * margin
        layer = nn.Conv2d(channels, features, size, bias=False)
        nn.init.orthogonal_(layer.weight, gain=max(1.0, channels * size**2 / features) ** 0.5)
        return layer

    def forward(
        self, output: Tensor, x_t: Tensor, x_0: Tensor, timestep: Tensor, activated: Tensor, alike: Sequence[Alike]
    ) -> Tensor:
        """The output, changed on the latent frames of clips that have observed ones.

        Args:
            output: (B, K, C, H, W) of the network.
            x_t: (B, K, C, H, W).
            x_0: (B, K, C, H, W) in [-1, 1], used on observed frames.
            timestep: (B,) int64.
            activated: (B, E) SiLU of the timestep embedding.
            alike: the clips, see `Alike.among`.
        """
        if not alike:
            if not torch.is_grad_enabled():
                return output
            # Processes that train together wait for the gradients of all weights, if only to hear that they are 0.
            return output + 0 * sum(parameter.sum() for parameter in self.parameters())
        # Differences of squares: too fine for half precision.
        with torch.autocast(output.device.type, enabled=False):
            output, activated = output.float(), activated.float()
            latent = torch.cat([group.latent.flatten() for group in alike])
            clip = torch.cat([group.clips.repeat_interleave(group.latent.shape[1]) for group in alike])
            # Nothing is learnt through the estimate: for eps it would be the loss many times over at high noise.
            estimate = self.process.predict_x_0(x_t, timestep, output.detach()).clamp(-1, 1)
            estimate, clean = (self.process.normalised(video).flatten(0, 1) for video in (estimate, x_0))
            asking = estimate.index_select(0, latent)
            noisy, drawn = (video.flatten(0, 1).index_select(0, latent) for video in (x_t, output))
            found = self._found(asking, clean, self.sharpness(activated).exp(), alike)
            own, own_noisy = (self._blocks(self.content, video, MARGINS[0]) for video in (asking, noisy))
            news = found - own.repeat(1, len(MARGINS), 1, 1)
            h = self.first(torch.cat([news, own, own_noisy, F.pixel_unshuffle(drawn, self.block)], dim=1))
            scale, shift = self.of_time(activated).index_select(0, clip)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
            h = h + self.second(F.silu(h))
            h = F.silu(h)
            h = h + self.third(h)
            change = F.pixel_shuffle(self.last(F.silu(h)), self.block)
            return output.flatten(0, 1).index_add(0, latent, change).view_as(output)

    def _found(self, asking: Tensor, clean: Tensor, sharpness: Tensor, alike: Sequence[Alike]) -> Tensor:
        """(F, heads * features, H / block, W / block) for the F latent frames (F, C, H, W).

        Args:
            asking: their estimates, group after group.
            clean: (B * K, C, H, W).
            sharpness: (B, heads).
            alike: the groups.
        """
        queries = torch.stack([self._blocks(layer, asking, margin) for layer, margin in self._comparisons()], dim=1)
        heads, height, width = queries.shape[1], *queries.shape[3:]
        found = []
        for group, own in zip(alike, torch.split(queries, [group.latent.numel() for group in alike]), strict=True):
            clips, frames = group.latent.shape
            # -s |p - q|^2 up to what is the same for all q: s (2 p . q - |q|^2).
            s = sharpness.index_select(0, group.clips)[:, :, None, None]
            p = own.view(clips, frames, heads, -1, height * width).permute(0, 2, 1, 4, 3).flatten(2, 3)
            p = torch.cat([2 * s * p, -s.expand(-1, -1, p.shape[2], -1)], dim=-1)  # (b, heads, L * blocks, f)
            sources = clean.index_select(0, group.observed.flatten())
            q = torch.stack([self._tokens(layer, sources, margin, clips) for layer, margin in self._comparisons()], 1)
            q = torch.cat([q, q.square().sum(-1, keepdim=True)], dim=-1)  # (b, heads, O * pixels, f)
            v = self._tokens(self.content, sources, MARGINS[0], clips)[:, None].expand_as(q)
            h = F.scaled_dot_product_attention(p, q, v, scale=1.0)
            h = h.view(clips, heads, frames, height, width, -1).permute(0, 2, 1, 5, 3, 4)
            found.append(h.reshape(clips * frames, -1, height, width))
        return torch.cat(found)

    def _comparisons(self) -> list[tuple[nn.Module, int]]:
        return list(zip(self.compare, MARGINS, strict=True))

    def _blocks(self, layer: nn.Module, video: Tensor, margin: int) -> Tensor:
        """The features (F, f, H / block, W / block) of the patches around the blocks of (F, C, H, W)."""
        padded = F.pad(video, (margin,) * 4, mode="replicate")
        return F.conv2d(padded, cast(nn.Conv2d, layer).weight, stride=self.block)

    def _tokens(self, layer: nn.Module, video: Tensor, margin: int, clips: int) -> Tensor:
        """The features (b, frames * H * W, f) of patches, one for each pixel, which is the first of a block."""
        after = margin + self.block - 1
        maps: Tensor = layer(F.pad(video, (margin, after, margin, after), mode="replicate"))
        return maps.permute(0, 2, 3, 1).reshape(clips, -1, maps.shape[1])
