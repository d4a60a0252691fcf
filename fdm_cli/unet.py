"""The factorized space-time UNet of FDM (arXiv 2205.11495, appendix).

Convolutions act on each frame; frames meet only in temporal attention. Inside, a batch of videos
(B, K, C, H, W) is a batch of frames (F, C, H, W) in channels_last memory, F = B * K at first. After the
last attention nothing mixes frames any more, so from there on only the frames whose output is asked
for (the latent ones) are computed.

Weights have the names of the authors' code, so that its checkpoints load as they are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fdm_cli.attention import GROUPS, FactorizedAttention, TemporalAttention, affine, relative_positions, zero_
from fdm_cli.blocks import Conditions, Downsample, Positions, ResidualBlock, Upsample, norm_silu
from fdm_cli.config import Config
from fdm_cli.diffusion import Process, normalised
from fdm_cli.draft import FEATURES, Draft, Drafts, features
from fdm_cli.patch_attention import PatchAttention
from fdm_cli.window import Window


def timestep_embedding(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding, (B,) -> (B, channels): cos half first; frequencies exp(-ln 10000 i / half)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device) / half)
    angles = timestep[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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
        """Leaves only the named weights to be trained, see `TrainingConfig.weights`."""
        self.requires_grad_(weights.startswith("all"))
        if self.patch_attention is not None:
            self.patch_attention.requires_grad_(weights != "draft")
        if self.draft is not None:
            self.draft.requires_grad_(weights in ("all", "draft"))

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
