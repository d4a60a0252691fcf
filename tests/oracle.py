"""The factorized space-time UNet a second time, plainly: what the shipped network is compared with.

Every frame is computed, observed and padding ones too, and every quirk of the trained models is kept.
Module names follow the official checkpoint format, so that its weights load as they are.

Axis letters: b clip, k frame of the window, c channel, p pixel (H*W of them), h head,
i querying frame (or pixel), j frame (or pixel) attended to, d channel within a head.
"""

import math

import torch
from torch import Tensor, nn

GROUPS = 32


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """(cos(t f_0), cos(t f_1), ..., sin(t f_0), sin(t f_1), ...), f_i = 10000^(-i / half), half = width / 2.

    `timestep` is (B,), integer or not; the result is (B, width) float32.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(timestep.device)
    angles = timestep.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def relative_features(frame_indices: Tensor) -> Tensor:
    """(log(1 + max(n, 0)), log(1 + max(-n, 0)), [n == 0]) with n = index_i - index_j; (B, K) -> (B, K, K, 3)."""
    n = frame_indices[:, :, None] - frame_indices[:, None, :]
    return torch.stack([n.clamp(min=0).float().log1p(), (-n).clamp(min=0).float().log1p(), (n == 0).float()], dim=-1)


def zeroed(module: nn.Module) -> nn.Module:
    """The same module with all its parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class RelativePositionNet(nn.Module):
    """r_ij = W_out SiLU(W_1 f_ij + W_2 tau): one vector for each pair of frames, f from `relative_features`.

    tau, (B, 4 * model_channels), is the timestep embedding after the two-layer MLP (not activated again).
    """

    def __init__(self, channels: int, embedding_width: int) -> None:
        super().__init__()
        self.embed_distances = nn.Linear(3, channels)
        self.embed_diffusion_time = nn.Linear(embedding_width, channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, features: Tensor, tau: Tensor) -> Tensor:
        hidden = self.embed_distances(features) + self.embed_diffusion_time(tau)[:, None, None, :]
        return self.out(nn.functional.silu(hidden))


class RelativePosition(nn.Module):
    """The vectors of a `RelativePositionNet`, split among the heads: (B, K, K, heads, channels / heads)."""

    def __init__(self, channels: int, embedding_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rpe_net = RelativePositionNet(channels, embedding_width)

    def forward(self, features: Tensor, tau: Tensor) -> Tensor:
        return self.rpe_net(features, tau).unflatten(-1, (self.num_heads, -1))


class SpatialAttention(nn.Module):
    """Each frame's pixels attend to each other.

    n = GroupNorm(x) with statistics of one frame; q, k, v = W n, the 3C outputs ordered (q, k, v) x head x channel;
    a_ij = softmax_j(q_i . k_j / sqrt(d)); o_i = sum_j a_ij v_j, torch's scaled dot product attention;
    the result is n_i + W_out o_i: the residual adds to the *normalised* input.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zeroed(nn.Linear(channels, channels))
        self.norm = nn.GroupNorm(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B*K, C, H, W) -> the same shape."""
        normed = self.norm(x).flatten(2)  # (B*K, C, pixels)
        qkv = self.qkv(normed.transpose(1, 2).contiguous())
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)  # (B*K, heads, pixels, d)
        result = normed + self.proj_out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2)
        return result.view(x.shape)


class TemporalAttention(nn.Module):
    """At each pixel the frames of the window attend to each other, knowing how far apart they are.

    n = GroupNorm(x) with statistics of one pixel over all K frames, padding included; q, k, v = W n as in space.
    With the three relative position vectors rq, rk, rv of each pair of frames, features of index_i - index_j,
    score_ij = (q_i . k_j + q_i . rk_ij + rq_ji . k_j) / sqrt(d)
    a_ij = softmax_j(score_ij) over those j that i may attend to
    o_i = sum_j a_ij (v_j + rv_ij); the result is n_i + W_out o_i, as in space.
    Each vector shifts what it is named after: rk the keys, rq the queries, rv the values. So the net called `rpe_k`
    meets the queries, and `rpe_q` the keys, with the pair the other way round (index_j - index_i).
    """

    def __init__(self, channels: int, embedding_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zeroed(nn.Linear(channels, channels))
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.rpe_q = RelativePosition(channels, embedding_width, num_heads)
        self.rpe_k = RelativePosition(channels, embedding_width, num_heads)
        self.rpe_v = RelativePosition(channels, embedding_width, num_heads)

    def forward(self, x: Tensor, tau: Tensor, features: Tensor, may_attend: Tensor) -> Tensor:
        """(B*K, C, H, W), (B, E), (B, K, K, 3), (B, K, K) bool -> (B*K, C, H, W)."""
        (B, K), (_, C, H, W) = may_attend.shape[:2], x.shape
        pixels = x.view(B, K, C, H * W).permute(0, 3, 1, 2).contiguous().view(B * H * W, K, C)
        # As images of 1 x K pixels with the channels last, which GroupNorm takes without another copy.
        normed = self.norm(pixels.transpose(1, 2).unsqueeze(2)).permute(0, 2, 3, 1).view(B, H * W, K, C)
        qkv = self.qkv(normed).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).contiguous()  # (B, pixels, heads, K, d)
        rq, rk, rv = (rpe(features, tau) for rpe in (self.rpe_q, self.rpe_k, self.rpe_v))

        scores = q @ k.transpose(-2, -1)
        scores = scores + torch.einsum("bphid,bijhd->bphij", q, rk)
        scores = scores + torch.einsum("bphjd,bjihd->bphij", k, rq)
        scores = scores / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~may_attend[:, None, None], -math.inf).softmax(dim=-1)
        mixed = weights @ v + torch.einsum("bphij,bijhd->bphid", weights, rv)

        result = normed + self.proj_out(mixed.transpose(2, 3).flatten(-2))
        return result.permute(0, 2, 3, 1).contiguous().view(x.shape)


class FactorizedAttention(nn.Module):
    """Temporal attention, then spatial attention."""

    def __init__(self, channels: int, embedding_width: int, num_heads: int) -> None:
        super().__init__()
        self.spatial_attention = SpatialAttention(channels, num_heads)
        self.temporal_attention = TemporalAttention(channels, embedding_width, num_heads)

    def forward(self, x: Tensor, tau: Tensor, features: Tensor, may_attend: Tensor) -> Tensor:
        return self.spatial_attention(self.temporal_attention(x, tau, features, may_attend))


class ResidualBlock(nn.Module):
    """skip(x) + conv(dropout(SiLU((1 + scale) GroupNorm(h) + shift))), h = conv(SiLU(GroupNorm(x))).

    (scale, shift), in this order, are the halves of a linear of SiLU(tau): the same for all frames of a clip.
    """

    def __init__(self, in_channels: int, channels: int, embedding_width: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, in_channels), nn.SiLU(inplace=True), nn.Conv2d(in_channels, channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, 2 * channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(inplace=True),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(channels, channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        frames_per_clip = x.shape[0] // tau.shape[0]
        scale, shift = self.emb_layers(tau).repeat_interleave(frames_per_clip, dim=0)[:, :, None, None].chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = torch.addcmul(shift, 1 + scale, norm(self.in_layers(x)))
        for layer in rest:
            h = layer(h)
        return h.add_(self.skip_connection(x))


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Each pixel twice in both directions, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=2))


class OracleUNet(nn.Module):
    """The factorized UNet of Flexible Diffusion Modeling (arXiv 2205.11495), predicting eps for all frames.

    Args:
        image_channels: C of the videos.
        image_size: H and W of the videos.
        model_channels: channels of the first level.
        num_res_blocks: residual blocks of each encoder level; a decoder level has one more.
        channel_mult: each level's channels in units of `model_channels`.
        attention_resolutions: heights at which an attention follows every residual block.
        num_heads: heads of every attention.
        dropout: probability, before the second convolution of a residual block.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        model_channels: int,
        num_res_blocks: int,
        channel_mult: tuple[int, ...],
        attention_resolutions: tuple[int, ...],
        num_heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        width = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))

        def block(in_channels: int, channels: int, resolution: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResidualBlock(in_channels, channels, width, dropout)]
            if resolution in attention_resolutions:
                layers.append(FactorizedAttention(channels, width, num_heads))
            return layers

        channels, resolution = model_channels * channel_mult[0], image_size
        encoder: list[list[nn.Module]] = [[nn.Conv2d(image_channels + 1, channels, 3, padding=1)]]
        skips = [channels]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                encoder.append(block(channels, model_channels * mult, resolution))
                channels = model_channels * mult
                skips.append(channels)
            if level < len(channel_mult) - 1:
                encoder.append([Downsample(channels)])
                resolution //= 2
                skips.append(channels)

        middle = [
            ResidualBlock(channels, channels, width, dropout),
            FactorizedAttention(channels, width, num_heads),
            ResidualBlock(channels, channels, width, dropout),
        ]

        decoder: list[list[nn.Module]] = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for _ in range(num_res_blocks + 1):
                decoder.append(block(channels + skips.pop(), model_channels * mult, resolution))
                channels = model_channels * mult
            if level > 0:
                decoder[-1].append(Upsample(channels))
                resolution *= 2

        self.input_blocks = nn.ModuleList(nn.ModuleList(layers) for layers in encoder)
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList(nn.ModuleList(layers) for layers in decoder)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(inplace=True),
            zeroed(nn.Conv2d(channels, image_channels, 3, padding=1)),
        )

    def forward(
        self,
        x_t: Tensor,
        timestep: Tensor,
        x_0: Tensor,
        frame_indices: Tensor,
        observed_mask: Tensor,
        latent_mask: Tensor,
    ) -> Tensor:
        """Eps of every frame, (B, K, C, H, W).

        Args:
            x_t: noisy videos (B, K, C, H, W).
            timestep: (B,), already scaled: integers for seed weights, t * 1000 / T for official ones.
            x_0: clean videos (B, K, C, H, W); only observed frames are read.
            frame_indices: (B, K) int64, positions in the video.
            observed_mask: (B, K) bool.
            latent_mask: (B, K) bool. A frame in neither mask is padding and enters as x_t.
        """
        observed = observed_mask[:, :, None, None, None]
        indicator = observed.to(x_t.dtype).expand_as(x_t[:, :, :1])
        h = torch.cat([torch.where(observed, x_0, x_t), indicator], dim=2).flatten(0, 1)

        tau = self.time_embed(timestep_embedding(timestep, self.model_channels))
        features = relative_features(frame_indices)
        real = observed_mask | latent_mask
        may_attend = real[:, :, None] == real[:, None, :]

        def run(layers: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in layers:
                if isinstance(layer, ResidualBlock):
                    h = layer(h, tau)
                elif isinstance(layer, FactorizedAttention):
                    h = layer(h, tau, features, may_attend)
                else:
                    h = layer(h)
            return h

        encoded = []
        for layers in self.input_blocks:
            h = run(layers, h)
            encoded.append(h)
        h = run(self.middle_block, h)
        for layers in self.output_blocks:
            h = run(layers, torch.cat([h, encoded.pop()], dim=1))
        return self.out(h).unflatten(0, x_t.shape[:2])
