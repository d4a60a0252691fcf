"""The factorized space-time UNet of FDM (arXiv 2205.11495, appendix).

Convolutions act on each frame; frames meet only in temporal attention. Inside, a batch of videos
(B, K, C, H, W) is a batch of frames (F, C, H, W) in channels_last memory, F = B * K at first. After the
last attention nothing mixes frames any more, so from there on only the frames whose output is asked
for (the latent ones) are computed.

Weights have the names of the authors' code, so that its checkpoints load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fdm_cli.attention import (
    GROUPS,
    Distances,
    FactorizedAttention,
    Relative,
    TemporalAttention,
    affine,
    relative_positions,
    zero_,
)
from fdm_cli.config import Config
from fdm_cli.diffusion import Process, normalised
from fdm_cli.draft import FEATURES, Alike, Draft, Drafts, features
from fdm_cli.dropout import Dropout
from fdm_cli.group_norm import group_norm
from fdm_cli.patch_attention import PatchAttention
from fdm_cli.winograd import Conv3x3


def timestep_embedding(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding, (B,) -> (B, channels): cos half first; frequencies exp(-ln 10000 i / half)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device) / half)
    angles = timestep[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@dataclass(frozen=True)
class Window:
    """What a call needs to know of its frames, the same at every denoising step: made once per window.

    Attributes:
        observed: (B, K) bool.
        latent: (B, K) bool.
        allowed: (B, K, K) bool, which frame attends to which: real ones to real ones, padding to padding; None when
            there is no padding.
        distances: between the frames.
        clip_of_frame: (B * K,) int64, the clip that each frame belongs to.
        latent_frames: the latent ones among the B * K frames, int64, and others that make up their number.
        counted: (B, K) bool, the frames that enter the statistics of the temporal GroupNorms; None for all.
    """

    observed: Tensor
    latent: Tensor
    allowed: Tensor | None
    distances: Distances
    clip_of_frame: Tensor
    latent_frames: Tensor
    counted: Tensor | None = None

    @cached_property
    def alike(self) -> list[Alike]:
        """Its clips by their numbers of observed and of latent frames."""
        return Alike.among(self.observed, self.latent)

    @staticmethod
    def of(
        frame_indices: Tensor,
        observed_mask: Tensor,
        latent_mask: Tensor,
        *,
        ignore_padding: bool = False,
        multiple: int = 1,
    ) -> Window:
        """From (B, K) int64 positions in the video and (B, K) bool masks.

        As many frames are computed to the end as there are latent ones, made up to a `multiple` by others of the call.

        Padding takes part in the statistics of the temporal GroupNorms: so it was when predecessors' models were
        trained, and ours are. With `ignore_padding` it does not, and a padded window gives what it gives without.
        """
        clips, count = frame_indices.shape
        real = observed_mask | latent_mask
        return Window(
            observed=observed_mask,
            latent=latent_mask,
            allowed=None if bool(real.all()) else real[:, :, None] == real[:, None, :],
            distances=Distances.between(frame_indices),
            clip_of_frame=torch.arange(clips, device=frame_indices.device).repeat_interleave(count),
            latent_frames=_made_up(latent_mask.flatten(), multiple),
            counted=real if ignore_padding and not real.all() else None,
        )


def _made_up(latent: Tensor, multiple: int) -> Tensor:
    """Where (F,) bool is set, int64, ascending; with as many other places as make the number a multiple, or F."""
    if multiple == 1:
        return latent.nonzero().squeeze(1)
    number = -(-int(latent.sum()) // multiple) * multiple
    return latent.argsort(descending=True, stable=True)[:number].sort().values


@dataclass(frozen=True)
class Conditions:
    """What every block may look at.

    Attributes:
        activated: (B, E) SiLU of the timestep embedding, for the residual blocks.
        relative: for each temporal attention, what it knows of pairs of frames.
        window: the frames of the call.
        clip_of_frame: (F,) int64, the clip that each frame that is still computed belongs to.
    """

    activated: Tensor
    relative: Mapping[TemporalAttention, Relative]
    window: Window
    clip_of_frame: Tensor


def norm_silu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU(scale * GroupNorm(x) + shift) of (F, C, H, W); scale and shift (F, C), or (C,) for all frames."""
    frames, channels, height, width = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(frames, height * width, 1, channels)  # a view of channels_last memory
    tokens = group_norm(tokens, scale, shift, GROUPS, silu=True)
    return tokens.view(frames, height, width, channels).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-conv, timestep scale and shift on the second GroupNorm, SiLU-dropout-conv, skip."""

    def __init__(self, channels: int, out_channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), Conv3x3(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        last = Conv3x3(out_channels, out_channels)
        zero_(last)
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out_channels), nn.SiLU(), Dropout(dropout), last)
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(F, C, H, W) -> (F, C', H, W)."""
        _, _, first_conv = self.in_layers
        _, _, dropout, second_conv = self.out_layers
        h = first_conv(norm_silu(x, *affine(self.in_layers[0])))
        weight, bias = affine(self.out_layers[0])
        scale, shift = self.emb_layers[1](conditions.activated).chunk(2, dim=1)
        scale, shift = weight * (1 + scale), bias * (1 + scale) + shift
        # Not by indexing: the sum in its backward pass depends on how threads meet.
        of_frame = (value.index_select(0, conditions.clip_of_frame) for value in (scale, shift))
        h = norm_silu(h, *of_frame)
        return second_conv(dropout(h)).add_(self.skip_connection(x))


class Positions(nn.Module):
    """Adds a learned vector for each position, which tells the network where in the frame it is.

    Not in FDM's network, whose spatial attention knows of places only what zero padding lets convolutions guess.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(channels, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """(F, C, H, W) -> the same."""
        return x + self.embedding.to(x.dtype)  # the map's own under autocast, or all that follows would be fp32


class Downsample(nn.Module):
    """Halves height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(F, C, H, W) -> (F, C, H / 2, W / 2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3 x 3 convolution.

    Of the nine pixels under the filter, those that are copies of one another get the sum of their weights: every
    output pixel needs 2 x 2 pixels of the small map, a filter of its own for each of the four places that it can
    have over a small pixel. That is the same result for 16 (H + 1) (W + 1) products a channel and filter, not 36 H W.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(F, C, H, W) -> (F, C, 2 H, 2 W)."""
        height, width = x.shape[2:]
        filters = _of_places(_of_places(self.conv.weight.permute(0, 2, 3, 1), 1), 2)  # (O, 4, 4, C)
        filters = filters.view(-1, 2, 2, 2, 2, filters.shape[-1]).permute(1, 3, 0, 5, 2, 4).flatten(0, 2)
        bias = None if self.conv.bias is None else self.conv.bias.repeat(4)
        # One row and column more than the small map has: what lies between its pixels, and at its borders.
        between = F.conv2d(x, filters.contiguous(memory_format=torch.channels_last), bias, padding=1)
        between = between.permute(0, 2, 3, 1).view(-1, height + 1, width + 1, 2, 2, x.shape[1])  # row's, column's place
        rows = []
        for a in range(2):
            places = [between[:, a : a + height, b : b + width, a, b] for b in range(2)]
            rows.append(torch.stack(places, dim=3))  # (F, H, W, 2, C)
        return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _of_places(weight: Tensor, dimension: int) -> Tensor:
    """Three taps of a filter as those of the two small pixels: two of even places, then two of odd ones."""
    first, second, third = weight.unbind(dimension)
    return torch.stack([first, second + third, first + second, third], dimension)


class UNet(nn.Module):
    """The network: predicts the process's target (eps, v or x_0) on latent frames given observed ones.

    Args:
        config: the whole configuration (`model`; of `diffusion` the scales of timesteps and pixels; whether
            activations are computed again).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.config = model
        self.activation_checkpointing = config.training.activation_checkpointing
        diffusion = config.diffusion
        self.diffusion = diffusion
        self.timestep_scale = 1000 / diffusion.timesteps if diffusion.rescale_timesteps else 1.0
        width, embedding = model.model_channels, 4 * model.model_channels
        patched = model.image_channels * model.patch_size**2
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def residual(channels: int, out_channels: int) -> ResidualBlock:
            return ResidualBlock(channels, out_channels, embedding, model.dropout)

        def attention(channels: int) -> FactorizedAttention:
            plain, bias = model.attention_residual == "plain", model.temporal_bias == "learned"
            return FactorizedAttention(channels, model.num_heads, embedding, plain, bias)

        resolution = model.image_size // model.patch_size
        channels = width
        encoder = [nn.ModuleList([nn.Conv2d(patched + 1, width, 3, padding=1)])]
        if model.positions == "learned":
            encoder[0].append(Positions(width, resolution))
        skips = [width]
        for level, mult in enumerate(model.channel_mult):
            for _ in range(model.num_res_blocks):
                layers: list[nn.Module] = [residual(channels, mult * width)]
                channels = mult * width
                if resolution in model.attention_resolutions:
                    layers.append(attention(channels))
                encoder.append(nn.ModuleList(layers))
                skips.append(channels)
            if level + 1 < len(model.channel_mult):
                encoder.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
                resolution //= 2
        self.input_blocks = nn.ModuleList(encoder)
        self.middle_block = nn.ModuleList(
            [residual(channels, channels), attention(channels), residual(channels, channels)]
        )
        decoder = []
        for level, mult in reversed(list(enumerate(model.channel_mult))):
            for position in range(model.num_res_blocks + 1):
                layers = [residual(channels + skips.pop(), mult * width)]
                channels = mult * width
                if resolution in model.attention_resolutions:
                    layers.append(attention(channels))
                if level > 0 and position == model.num_res_blocks:
                    layers.append(Upsample(channels))
                    resolution *= 2
                decoder.append(nn.ModuleList(layers))
        self.output_blocks = nn.ModuleList(decoder)
        last = nn.Conv2d(channels, patched, 3, padding=1)
        zero_(last)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), last)
        self.patch_attention = None
        if model.patch_attention != "none":
            self.patch_attention = PatchAttention(model, embedding, Process(diffusion))
        self.draft = None
        if model.draft != "none":
            self.draft = Draft(model)
            of_weight = model.patch_size**2
            self.of_draft = nn.Conv2d(patched + of_weight + FEATURES, width, 3, padding=1)
            zero_(self.of_draft)
        self._leave(config.training.weights)
        blocks = [self.middle_block, *self.output_blocks]
        self._last_attention = [m for b in blocks for m in b if isinstance(m, FactorizedAttention)][-1:]
        self._temporal_attentions = [module for module in self.modules() if isinstance(module, TemporalAttention)]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self,
        x_t: Tensor,
        timestep: Tensor,
        *,
        x_0: Tensor,
        frame_indices: Tensor,
        observed_mask: Tensor,
        latent_mask: Tensor,
        frames: Literal["latent", "all"] = "latent",
        window: Window | None = None,
        drafts: Drafts | None = None,
    ) -> Tensor:
        """Predicts the process's target.

        Args:
            x_t: (B, K, C, H, W) noisy video; used on frames that are not observed.
            timestep: (B,) int64 in 0..T-1.
            x_0: (B, K, C, H, W) clean video in [-1, 1]; used on observed frames.
            frame_indices: (B, K) int64, positions in the video.
            observed_mask: (B, K) bool.
            latent_mask: (B, K) bool; a frame that is neither is padding and attends only to padding.
            frames: with `latent`, the output on other frames is 0 and costs less (but for those that make up a
                window's number, see `Window.of`); `all` computes them too.
            window: made of the last three by `Window.of`, when they stay the same over several calls.
            drafts: see `drafts`, when x_0 stays the same, too.

        Returns:
            (B, K, C, H, W).
        """
        if window is None:
            window = Window.of(frame_indices, observed_mask, latent_mask)
        clips, count = frame_indices.shape
        flag = window.observed[:, :, None, None, None]
        h = torch.where(flag, normalised(x_0, self.diffusion), x_t).flatten(0, 1)
        h = F.pixel_unshuffle(h, self.config.patch_size)
        flag_channel = flag.flatten(0, 1).to(h.dtype).expand(-1, 1, *h.shape[2:])
        h = torch.cat([h, flag_channel], dim=1).contiguous(memory_format=torch.channels_last)

        temb = self.time_embed(timestep_embedding(timestep * self.timestep_scale, self.config.model_channels))
        relative = relative_positions(self._temporal_attentions, window.distances, temb)
        conditions = Conditions(F.silu(temb), relative, window, window.clip_of_frame)
        wanted = window.latent_frames if frames == "latent" else None
        if wanted is not None and not len(wanted):
            return torch.zeros_like(x_t)

        run = self._run
        if self.activation_checkpointing and torch.is_grad_enabled():
            run = partial(checkpoint, self._run, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)
        skips = []
        for number, block in enumerate(self.input_blocks):
            h, _ = run(block, h, conditions, None)
            if number == 0 and self.draft is not None:
                h = self._told(h, drafts or self.drafts(x_0, frame_indices, window), window)
            skips.append(h)
        h, conditions = run(self.middle_block, h, conditions, wanted)
        for block in self.output_blocks:
            skip = skips.pop()
            if len(skip) > len(h):
                skip = skip[wanted]
            h, conditions = run(block, torch.cat([h, skip], dim=1), conditions, wanted)
        h = self.out[2](norm_silu(h, *affine(self.out[0])))
        h = F.pixel_shuffle(h, self.config.patch_size)
        if wanted is not None:
            h = h.new_zeros(clips * count, *h.shape[1:]).index_copy(0, wanted, h)
        output = h.view(clips, count, *h.shape[1:])
        if self.patch_attention is not None:
            output = self.patch_attention(output, x_t, x_0, timestep, conditions.activated, window.alike)
        return output

    def _leave(self, weights: str) -> None:
        """Leaves only the named weights to be trained: `all`, `patch_attention` or `draft`."""
        self.requires_grad_(weights == "all")
        if self.patch_attention is not None:
            self.patch_attention.requires_grad_(weights != "draft")
        if self.draft is not None:
            self.draft.requires_grad_(weights != "patch_attention")

    def drafts(self, x_0: Tensor, frame_indices: Tensor, window: Window) -> Drafts | None:
        """What is made of the observed frames alone, the same for all timesteps; None where nothing is."""
        if self.draft is None or not window.alike:
            return None
        with torch.no_grad():
            made: Drafts = self.draft(x_0, frame_indices, window.alike)
        return made

    def _told(self, h: Tensor, drafts: Drafts | None, window: Window) -> Tensor:
        """The first features of all frames, told what the drafts show of theirs.

        The draft learns nothing through it: it has a loss of its own.
        """
        if drafts is None or not window.alike:
            if not torch.is_grad_enabled():
                return h
            # Processes that train together wait for the gradients of all weights, if only to hear that they are 0.
            return h + 0 * sum(parameter.sum() for parameter in self.of_draft.parameters())
        shown = torch.cat([normalised(drafts.frames, self.diffusion), drafts.weight / 4], dim=1).detach()
        shown = F.pixel_unshuffle(shown, self.config.patch_size)
        distance = features(drafts.distance.float())[:, :, None, None].expand(-1, -1, *shown.shape[2:])
        told: Tensor = self.of_draft(torch.cat([shown, distance], dim=1))
        latent = torch.cat([group.latent.flatten() for group in window.alike])
        # `index_add` would lay out channels_last maps anew, to the cost of what comes next.
        positions, told = (maps.permute(0, 2, 3, 1) for maps in (h, told.to(h.dtype)))
        return positions.index_add(0, latent, told).permute(0, 3, 1, 2)

    def _run(
        self, block: nn.Module, h: Tensor, conditions: Conditions, wanted: Tensor | None
    ) -> tuple[Tensor, Conditions]:
        """One block; the network's last attention leaves only the wanted frames, in `h` and the conditions."""
        for layer in block.children():
            if isinstance(layer, ResidualBlock):
                h = layer(h, conditions)
            elif isinstance(layer, FactorizedAttention):
                keep = wanted if layer is self._last_attention[0] else None
                window, relative = conditions.window, conditions.relative[layer.temporal_attention]
                h = layer(h, relative, window.allowed, keep, window.counted)
                if keep is not None:
                    conditions = replace(conditions, clip_of_frame=conditions.clip_of_frame[keep])
            else:
                h = layer(h)
        return h, conditions
