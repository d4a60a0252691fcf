"""Attention of the factorized UNet: over frames at each position, then over positions in each frame.

Feature maps come as (B, K, P, C): clip, frame, position (P = H * W), channel, channel last, which is
how `channels_last` convolutions leave them in memory: neither attention needs a permuted copy of its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdm_cli.group_norm import group_norm_linear, group_norm_of

GROUPS = 32  # of every GroupNorm


def zero_(module: nn.Linear | nn.Conv2d) -> None:
    """Zero-initialises a layer, so that the block that ends in it starts as the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Distances:
    """The distances between the frames of windows: features of each that occurs in a clip, and where it occurs.

    A window of K frames has K * K pairs but, where frames are evenly spaced, only 2 K - 1 distances. Depends on
    nothing but the frame indices: made once per window, whatever the number of denoising steps.

    Attributes:
        features: (U, 3), clip after clip, of d = i_query - i_key: (log(1 + max(d, 0)), log(1 + max(-d, 0)), [d = 0]).
        clip: (U,) int64, the clip that each of them occurs in.
        index: (B, K, K) int64, query first: which of the U distances each pair has.
    """

    features: Tensor
    clip: Tensor
    index: Tensor

    @staticmethod
    def between(frame_indices: Tensor) -> Distances:
        """The distances of (B, K) int64 positions in the video."""
        pairs = frame_indices[:, :, None] - frame_indices[:, None, :]
        lowest = pairs.min()
        span = pairs.max() - lowest + 1
        clips = torch.arange(len(pairs), device=pairs.device)[:, None, None]
        values, index = torch.unique(clips * span + pairs - lowest, return_inverse=True)
        d = (values % span + lowest).float()
        features = [torch.log1p(d.clamp(min=0)), torch.log1p((-d).clamp(min=0)), (d == 0).float()]
        return Distances(torch.stack(features, dim=-1), values // span, index)


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a GroupNorm, which holds parameters here and computes nothing: see `group_norm`."""
    norm = cast(nn.GroupNorm, norm)
    return norm.weight, norm.bias


class TemporalBias(nn.Module):
    """What each head adds to its logits by the distance d of two frames: -slope |f(d) - place| - own [d = 0].

    With f(d) = sign(d) log(1 + |d|). At first the heads look for the frame before, the one after, two before, two after
    and so on, or what is nearest to it; the last one sees all alike. What is in the frame itself the residual carries
    anyway. Motion shows between neighbours: a network whose heads all begin with an average over the window has to find
    them first, which takes most of a short training. Not in FDM.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        distance = torch.tensor([(1 + head // 2) * (-1) ** head for head in range(num_heads)])
        self.place = nn.Parameter(distance.sign() * distance.abs().log1p())
        looking = torch.tensor([1.0] * (num_heads - 1) + [0.0])
        self.slope = nn.Parameter(6 * looking)
        self.own = nn.Parameter(20 * looking)

    def forward(self, distances: Distances) -> Tensor:
        """(B, heads, K, K), query first."""
        past, future, same = distances.features[..., None].unbind(1)
        bias = -self.slope * (past - future - self.place).abs() - self.own * same  # (U, heads)
        # Not by indexing: the sum in its backward pass depends on how threads meet.
        return bias.index_select(0, distances.index.flatten()).view(*distances.index.shape, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Relative:
    """What a temporal attention knows of pairs of frames.

    Attributes:
        vectors: (3, B, K, K, heads, C / heads), of its nets for queries, keys and values.
        bias: (B, heads, K, K), added to the logits; None for nothing.
    """

    vectors: Tensor
    bias: Tensor | None = None


class RelativePositionNet(nn.Module):
    """One vector per pair of frames and head, from their distance and the timestep (FDM, appendix).

    R = W_out SiLU(W_d distance_features + W_t temb), W_out zero-initialised. `relative_positions` computes it.
    """

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.embed_distances = nn.Linear(3, channels)
        self.embed_diffusion_time = nn.Linear(embedding, channels)
        self.out = nn.Linear(channels, channels)
        zero_(self.out)


class RelativePosition(nn.Module):
    """Holds the net under the name that existing checkpoints use."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.rpe_net = RelativePositionNet(channels, embedding)


def relative_positions(
    attentions: Sequence[TemporalAttention], distances: Distances, temb: Tensor
) -> dict[TemporalAttention, Relative]:
    """What a call's frames are to one another, for each attention.

    The vectors of all nets of a network are made at once: many small products cost little more than one.

    Args:
        attentions: the network's.
        distances: between the frames of the windows.
        temb: (B, E) timestep embedding.
    """
    relative: dict[TemporalAttention, Relative] = {}
    for channels, group in groupby(sorted(attentions, key=lambda a: a.channels), key=lambda a: a.channels):
        members = list(group)
        nets = [position.rpe_net for a in members for position in (a.rpe_q, a.rpe_k, a.rpe_v)]

        def stacked(name: str, nets: list[RelativePositionNet] = nets) -> tuple[Tensor, Tensor]:
            layers = [getattr(net, name) for net in nets]
            return torch.stack([layer.weight.T for layer in layers]), torch.stack([layer.bias for layer in layers])

        (W_d, b_d), (W_t, b_t), (W_out, b_out) = map(stacked, ("embed_distances", "embed_diffusion_time", "out"))
        # Each bias is added for itself: autograd would hand the sum's gradient to both, as one tensor.
        of_distance = distances.features @ W_d + b_d[:, None]  # (nets, U, C)
        of_time = temb @ W_t + b_t[:, None]  # (nets, B, C)
        hidden = F.silu(of_distance + of_time.index_select(1, distances.clip))
        made = torch.baddbmm(b_out[:, None], hidden, W_out)  # (nets, U, C)
        pairs = made.index_select(1, distances.index.flatten()).view(len(nets), *distances.index.shape, channels)
        for attention, own in zip(members, torch.split(pairs, 3), strict=True):
            vectors = own.view(*own.shape[:-1], attention.num_heads, channels // attention.num_heads)
            bias = attention.bias(distances) if attention.bias is not None else None
            relative[attention] = Relative(vectors, bias)
    return relative


class TemporalAttention(nn.Module):
    """Attention over the K frames, at each position, with relative frame positions.

    With scale s = (C / heads)^-1/2, query frame i and key frame j:

        logit_ij = s (q_i k_j + q_i Rk_ij + k_j Rq_ji) + bias_ij,   out_i = sum_j softmax_j(logit_ij) (v_j + Rv_ij)

    Each net shifts what it is named after: Rk is a term of the keys, so it meets the queries.
    The GroupNorm takes its statistics over all K frames of the position, or over those that are `counted`.
    """

    def __init__(
        self, channels: int, num_heads: int, embedding: int, plain_residual: bool, temporal_bias: bool = False
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_heads = num_heads
        self.plain_residual = plain_residual
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)
        self.rpe_q = RelativePosition(channels, embedding)
        self.rpe_k = RelativePosition(channels, embedding)
        self.rpe_v = RelativePosition(channels, embedding)
        self.bias = TemporalBias(num_heads) if temporal_bias else None
        zero_(self.proj_out)

    def forward(
        self, x: Tensor, relative: Relative, allowed: Tensor | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """(B, K, P, C) -> the same.

        Args:
            x: features.
            relative: of `relative_positions`.
            allowed: (B, K, K) bool: whether frame i attends to frame j; None when all do.
            counted: (B, K) bool, the frames that enter the statistics of the GroupNorm; None for all.
        """
        if counted is None:
            normed, qkv = group_norm_linear(x, *affine(self.norm), GROUPS, self.qkv.weight, self.qkv.bias)
        else:
            normed = group_norm_of(x, *affine(self.norm), GROUPS, counted)
            qkv = self.qkv(normed)
        qkv = qkv.view(*qkv.shape[:-1], 3, self.num_heads, -1)  # (B, K, P, 3, h, f)
        # One copy lets the many small products over the frames of a pixel run as one batch.
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).contiguous()  # (B, P, h, K, f) each
        R_q, R_k, R_v = relative.vectors
        # What is scaled is the products as they are made, and the few vectors: no copies of q and k are kept.
        scale = q.shape[-1] ** -0.5
        pairs = q.flatten(0, 2), k.flatten(0, 2).transpose(1, 2)
        logits = torch.baddbmm(q.new_zeros(1, 1, 1), *pairs, beta=0, alpha=scale).view(*q.shape[:4], -1)
        logits += torch.einsum("bphif,bijhf->bphij", q, scale * R_k)
        logits += torch.einsum("bphjf,bjihf->bphij", k, scale * R_q)
        if relative.bias is not None:
            logits += relative.bias[:, None]
        if allowed is not None:
            logits = logits.masked_fill(~allowed[:, None, None], float("-inf"))
        weights = logits.softmax(-1)
        out = weights @ v
        out = out + torch.einsum("bphij,bijhf->bphif", weights, R_v)
        out = self.proj_out(out.permute(0, 3, 1, 2, 4).flatten(3))
        return out.add_(x if self.plain_residual else normed)


class SpatialAttention(nn.Module):
    """Attention over the P positions of each frame."""

    def __init__(self, channels: int, num_heads: int, plain_residual: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.plain_residual = plain_residual
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)
        zero_(self.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        """(F, P, C) -> the same; F frames of any clips."""
        maps = group_norm_linear(x[:, :, None], *affine(self.norm), GROUPS, self.qkv.weight, self.qkv.bias)
        normed, qkv = (value.squeeze(2) for value in maps)
        # In bf16 the backward pass of PyTorch's kernel for CPUs takes five times as long as in fp32.
        wide = qkv.float() if qkv.device.type == "cpu" else qkv
        q, k, v = wide.view(*wide.shape[:-1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(qkv.dtype)
        return self.proj_out(out).add_(x if self.plain_residual else normed)


class FactorizedAttention(nn.Module):
    """Temporal attention, then spatial attention (FDM, appendix)."""

    def __init__(
        self, channels: int, num_heads: int, embedding: int, plain_residual: bool, temporal_bias: bool = False
    ) -> None:
        super().__init__()
        self.temporal_attention = TemporalAttention(channels, num_heads, embedding, plain_residual, temporal_bias)
        self.spatial_attention = SpatialAttention(channels, num_heads, plain_residual)

    def forward(
        self,
        x: Tensor,
        relative: Relative,
        allowed: Tensor | None = None,
        keep: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """(B * K, C, H, W) channels_last -> the same, or (len(keep), C, H, W).

        Args:
            x: features of all frames.
            relative: see TemporalAttention.forward, as are `allowed` and `counted`.
            allowed: as above.
            keep: the frames (of B * K) that anybody still wants after the temporal attention; None for all.
            counted: as above.
        """
        clips, frames = relative.vectors.shape[1:3]
        height, width = x.shape[2:]
        tokens = x.permute(0, 2, 3, 1).reshape(clips, frames, height * width, -1)
        tokens = self.temporal_attention(tokens, relative, allowed, counted).flatten(0, 1)
        if keep is not None:
            tokens = tokens.index_select(0, keep)
        return self.spatial_attention(tokens).unflatten(1, (height, width)).permute(0, 3, 1, 2)
