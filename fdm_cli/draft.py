"""A first estimate of latent frames, made of the observed ones alone: their blocks of pixels, moved.

The factorized network has to learn motion through temporal attention, which looks at one place of a small map at a
time: of a block that moves, the place changes. Here every block with something in it is a token of its own that knows
what lies around it, where and when it is, and how well what it shows fits the neighbouring observed frames at each of
a grid of velocities. Attention among all tokens of a window tells what moves together and what it will run into; each
token then says how far its pixels have come by the time of each latent frame, and how much they count there. The pixels
are added up where they arrive, as "splatting" does (Niklaus and Liu, "Softmax splatting for video frame
interpolation", 2020, with weights of the same form).

Not in FDM. In sampling it costs one pass a window, however many denoising steps there are; it is trained by a loss of
its own, its squared error. What it cannot know it blurs: it is a mean of futures, to be looked at, not a frame to be
shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdm_cli.attention import zero_
from fdm_cli.config import ModelConfig
from fdm_cli.window import Alike

BLOCKS = 8  # to a side of a frame
UNITS = 4  # of length, to a side of a block: places and velocities are in these, whatever the size of a frame
SHARE = 5 / 16  # of all blocks, those with most contrast, that are tokens
CONTRAST = 0.1  # of a pixel to the window's median, on a scale of 0 to 1, that makes its block one
CHANNELS = 64
HEADS = 4
LAYERS = 4
SPEEDS = 7  # to an axis
FASTEST = 1.8  # units a frame, along an axis
NEIGHBOURS = (-3, -2, -1, 1, 2, 3)  # among the observed frames, that a token's velocity is read from
FREQUENCIES = 4  # of a patch, along an axis, that are compared
FORGETTING = 0.2  # of a token's say with each frame that it is away, at first


@dataclass(frozen=True)
class Drafts:
    """Of F latent frames, group after group.

    Attributes:
        frames: (F, C, H, W), of the range of x_0; where nothing arrives, the median pixel of the observed frames.
        weight: (F, 1, H, W), a logarithm: how much arrived at each pixel.
        distance: (F,) int64, frames to the nearest observed one.
    """

    frames: Tensor
    weight: Tensor
    distance: Tensor


def features(distance: Tensor, longest: int = 64) -> Tensor:
    """Of signed lengths, (...) -> (..., n): sines and cosines of half-waves of 2, 4, .. `longest`, and their eighth."""
    waves = math.pi / 2 ** torch.arange(1, longest.bit_length(), device=distance.device)
    angles = distance[..., None] * waves
    return torch.cat([angles.sin(), angles.cos(), (distance / 8).clamp(-3, 3)[..., None]], dim=-1)


FEATURES = 13  # of `features`


class Draft(nn.Module):
    """See the module.

    Args:
        config: of the network; `image_size` is a multiple of 8.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.block = config.image_size // BLOCKS
        patch = config.image_channels * (self.block + 2 * (self.block // 2)) ** 2
        evidence = len(NEIGHBOURS) * (SPEEDS**2 + 1)
        self.embed = nn.Sequential(
            nn.Linear(patch + evidence + 3 * FEATURES, CHANNELS), nn.SiLU(), nn.Linear(CHANNELS, CHANNELS)
        )
        # A wave for each pair of channels of a head, along one of (y, x, t) at first.
        pairs = CHANNELS // HEADS // 2
        waves = torch.zeros(HEADS, pairs, 3)
        for pair in range(pairs):
            waves[:, pair, pair % 3] = math.pi / 2 ** (1 + pair // 3)
        self.waves = nn.Parameter(waves)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(CHANNELS)
        self.of_token = nn.Linear(CHANNELS, CHANNELS)
        self.scale = nn.Linear(FEATURES, CHANNELS)
        self.shift = nn.Linear(FEATURES, CHANNELS)
        self.hidden = nn.Linear(CHANNELS, CHANNELS)
        self.move = nn.Linear(CHANNELS, 3)  # mean velocity along y and x; the logarithm of a weight
        nn.init.normal_(self.move.weight, std=0.02)
        nn.init.zeros_(self.move.bias)
        self.nothing = nn.Parameter(torch.tensor(-3.0))  # the weight of what is empty, a logarithm
        self.bright = nn.Parameter(torch.tensor(2.0))  # how much more a pixel counts that stands out

    @property
    def inner(self) -> list[nn.Module]:
        """The layers from channels to channels."""
        return [self.embed[2], *self.layers.modules(), self.of_token, self.hidden]

    def forward(self, x_0: Tensor, frame_indices: Tensor, alike: Sequence[Alike]) -> Drafts:
        """Drafts of the latent frames of clips that have observed ones.

        Args:
            x_0: (B, K, C, H, W) in [-1, 1], used on observed frames.
            frame_indices: (B, K) int64.
            alike: the clips, see `Alike.among`.
        """
        if not alike:
            # Processes that train together wait for the gradients of all weights, if only to hear that they are 0.
            zero = 0 * sum((parameter.sum() for parameter in self.parameters()), x_0.new_zeros(()))
            size = x_0.shape[3:]
            return Drafts(zero.expand(0, x_0.shape[2], *size), zero.expand(0, 1, *size), frame_indices.new_zeros(0))
        pixels, index = x_0.flatten(0, 1).float().add(1).div(2), frame_indices.flatten()
        with torch.autocast(x_0.device.type, enabled=False):
            made = [self._group(pixels, index, group) for group in alike]
        return Drafts(*(torch.cat(parts) for parts in zip(*made, strict=True)))

    def _group(self, pixels: Tensor, index: Tensor, group: Alike) -> tuple[Tensor, Tensor, Tensor]:
        observed, order = index[group.observed].sort(dim=1)
        latent = index[group.latent]
        clips = pixels.index_select(0, group.observed.gather(1, order).flatten()).view(
            *observed.shape, *pixels.shape[1:]
        )
        tokens = self._tokens(clips, observed)
        frames, weight = self._splat(tokens, self._say(tokens, observed.amax(1)), latent, clips.shape[3])
        nearest = (latent[:, :, None] - observed[:, None]).abs().amin(2)
        return frames.flatten(0, 1), weight.flatten(0, 1), nearest.flatten()

    def _tokens(self, clips: Tensor, observed: Tensor) -> _Tokens:
        """The blocks with most contrast of (b, O, C, H, W) in [0, 1], whose places are (b, O)."""
        block = self.block
        with torch.no_grad():
            background = clips.transpose(1, 2).flatten(2).median(dim=2).values[:, None, :, None, None]
            clips = clips - background
            contrast = F.max_pool2d(clips.abs().amax(2), block).flatten(1)  # (b, O * blocks)
            count = math.ceil(contrast.shape[1] * SHARE)
            contrast, place = contrast.sort(dim=1, descending=True, stable=True)
            contrast, place = contrast[:, :count], place[:, :count]
            frame, y, x = place // BLOCKS**2, place % BLOCKS**2 // BLOCKS * block, place % BLOCKS * block
            around, own = (
                _of_places(F.unfold(clips.flatten(0, 1), block + 2 * margin, padding=margin, stride=block), place)
                for margin in (block // 2, 0)
            )
            return _Tokens(
                real=contrast > CONTRAST,
                frame=frame,
                time=observed.gather(1, frame),
                y=y,
                x=x,
                pixels=own.view(*place.shape, -1, block, block),
                around=around,
                evidence=self._evidence(clips.mean(2), observed, frame, y, x),
                background=background[:, 0, :, 0, 0],
            )

    def _evidence(self, grey: Tensor, observed: Tensor, frame: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """How alike a patch is to what is where it would have been or be at each velocity, and 1 for a frame there.

        Args:
            grey: (b, O, H, W).
            observed: (b, O).
            frame: (b, N), see `_Tokens`.
            y: (b, N).
            x: (b, N).

        Returns:
            (b, N, neighbours * (velocities + 1)).
        """
        block, unit = self.block, self.block / UNITS
        reach = math.ceil(3 * FASTEST * unit)  # what is further away is taken for the outermost place
        margins = (block // 2 + reach, 2 * block - 1 - block // 2 + reach) * 2
        maps = _low_frequencies(F.pad(grey.flatten(0, 1)[:, None], margins), 2 * block)
        side = maps.shape[2]
        maps = maps.permute(0, 2, 3, 1).flatten(0, 2)
        maps = maps / (maps.square().sum(1, keepdim=True).sqrt() + 0.1)
        speeds = torch.linspace(-FASTEST, FASTEST, SPEEDS, device=grey.device)
        velocities = torch.cartesian_prod(speeds, speeds)
        first = torch.arange(len(observed), device=observed.device)[:, None] * observed.shape[1]
        own = F.embedding(((first + frame) * side + y + reach) * side + x + reach, maps)
        alike, there = [], []
        for step in NEIGHBOURS:
            other = frame + step
            is_there = (other >= 0) & (other < observed.shape[1])
            other = other.clamp(0, observed.shape[1] - 1)
            time = (observed.gather(1, other) - observed.gather(1, frame))[..., None, None]
            shift = (velocities * (time * unit)).round().long()
            to_y, to_x = (
                (place[..., None] + shift[..., axis] + reach).clamp(0, side - 1) for axis, place in enumerate((y, x))
            )
            found = F.embedding(((first + other)[..., None] * side + to_y) * side + to_x, maps)
            likeness = (found * own[:, :, None]).sum(-1)
            alike.append(torch.exp(6 * (likeness - 1)) * is_there[..., None])
            there.append(is_there.float())
        return torch.cat([*alike, torch.stack(there, dim=-1)], dim=-1)

    def _say(self, tokens: _Tokens, last: Tensor) -> Tensor:
        """(b, N, channels) after attention; places in time are relative to the `last` observed frame, (b,)."""
        unit = self.block / UNITS
        time = (tokens.time - last[:, None]).float()
        middle = UNITS * BLOCKS / 2 - UNITS / 2
        places = [tokens.y / unit - middle, tokens.x / unit - middle, time]
        h = self.embed(torch.cat([tokens.around, tokens.evidence, *map(features, places)], dim=-1))
        position = torch.stack([tokens.y / self.block, tokens.x / self.block, time], dim=-1)
        angles = torch.einsum("bnc,hpc->bhnp", position, self.waves)
        turn = angles.cos(), angles.sin()
        # A window without any token still needs something to attend to.
        real = tokens.real | (torch.arange(tokens.real.shape[1], device=last.device) == 0)
        for layer in self.layers:
            h = layer(h, real[:, None, None], turn)
        said: Tensor = self.of_token(F.silu(self.norm(h)))
        return said

    def _splat(self, tokens: _Tokens, said: Tensor, latent: Tensor, height: int) -> tuple[Tensor, Tensor]:
        """What arrives at (b, L) latent frames, (b, L, C, H, W) and (b, L, 1, H, W): see `Drafts`."""
        block, unit = self.block, self.block / UNITS
        ahead = latent[:, None] - tokens.time[:, :, None]  # (b, N, L)
        h = features(ahead.float())
        h = F.silu(said[:, :, None] * (1 + self.scale(h)) + self.shift(h))
        velocity, weight = self.move(F.silu(self.hidden(h))).split((2, 1), dim=-1)
        weight = weight[..., 0] - FORGETTING * ahead.abs().clamp(max=20)
        moved = velocity * (ahead.clamp(-16, 16) * unit)[..., None]
        y, x = (
            (place[:, :, None] + moved[..., axis]).clamp(-block, height + 1)
            for axis, place in enumerate((tokens.y, tokens.x))
        )
        top, left = y.detach().floor(), x.detach().floor()
        # (b, N, 1, h, w) of a token, (b, N, L, h, w) of what it becomes.
        grey = tokens.pixels.abs().mean(2)[:, :, None]
        counts = (weight[..., None, None] + self.bright * grey).clamp(-12, 12).exp()
        counts = counts * tokens.real[:, :, None, None, None]
        value = torch.stack([counts, *(counts * own[:, :, None] for own in tokens.pixels.unbind(2))], dim=-1)
        down, right = ((place - whole)[..., None, None, None] for place, whole in ((y, top), (x, left)))
        value = F.pad(value * (1 - down), (0, 0, 0, 0, 0, 1)) + F.pad(value * down, (0, 0, 0, 0, 1, 0))
        value = F.pad(value * (1 - right), (0, 0, 0, 1)) + F.pad(value * right, (0, 0, 1, 0))
        side = height + 2 * block + 2
        frame = torch.arange(latent.numel(), device=latent.device).view_as(latent)[:, None]
        corner = (frame * side + top.long() + block) * side + left.long() + block
        reach = torch.arange(block + 1, device=latent.device)
        place = corner[..., None, None] + reach[:, None] * side + reach
        sums = value.new_zeros(latent.numel() * side**2, value.shape[-1])
        sums = sums.index_add(0, place.flatten(), value.flatten(0, -2))
        sums = sums.view(*latent.shape, side, side, -1)[:, :, block : block + height, block : block + height]
        total, *channels = sums.unbind(-1)
        total = total + self.nothing.exp()
        frames = torch.stack([channel / total for channel in channels], dim=2)
        frames = frames + tokens.background[:, None, :, None, None]
        return 2 * frames - 1, total.log()[:, :, None]


class Layer(nn.Module):
    """Attention among the tokens of a window, and two linear layers on each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        last = nn.Linear(2 * CHANNELS, CHANNELS)
        self.mlp = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 2 * CHANNELS), nn.SiLU(), last)
        zero_(self.out)
        zero_(last)

    def forward(self, h: Tensor, real: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """(b, N, channels) -> the same.

        Args:
            h: the tokens.
            real: (b, 1, 1, N) bool, which of them are attended to.
            turn: cosine and sine of what queries and keys are turned by, (b, heads, N, pairs): what they give depends
                on how far apart they are (Su et al., "RoFormer", 2021).
        """
        q, k, v = self.qkv(self.norm(h)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(_turned(q, *turn), _turned(k, *turn), v, attn_mask=real)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        changed: Tensor = h + self.mlp(h)
        return changed


@dataclass(frozen=True)
class _Tokens:
    """N blocks of each window.

    Attributes:
        real: (b, N) bool; the others only make up the number.
        frame: (b, N) int64, among the observed ones.
        time: (b, N) int64, where that frame is in the video.
        y: (b, N) int64, the first row, in pixels.
        x: (b, N) int64, the first column.
        pixels: (b, N, C, block, block), relative to the background, as is what lies around.
        around: (b, N, patch), with half a block on each side.
        evidence: (b, N, n), see `Draft._evidence`.
        background: (b, C) in [0, 1], the median pixel of the observed frames.
    """

    real: Tensor
    frame: Tensor
    time: Tensor
    y: Tensor
    x: Tensor
    pixels: Tensor
    around: Tensor
    evidence: Tensor
    background: Tensor


def _turned(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Each pair of channels, the n-th of both halves, turned by its angle."""
    one, two = vectors.chunk(2, dim=-1)
    return torch.cat([one * cosine - two * sine, one * sine + two * cosine], dim=-1)


def _of_places(values: Tensor, place: Tensor) -> Tensor:
    """(b * O, n, blocks) values, (b, N) places among the O * blocks -> (b, N, n)."""
    values = values.mT.reshape(len(place), -1, values.shape[1])
    return values.gather(1, place[..., None].expand(-1, -1, values.shape[2]))


def _low_frequencies(video: Tensor, size: int) -> Tensor:
    """(F, 1, H, W) -> (F, n, H', W'): of every patch the n = 15 lowest cosines but the constant one; of 2 x 2 three."""
    places = (torch.arange(size, device=video.device) + 0.5) / size
    waves = torch.stack([torch.cos(math.pi * places * number) for number in range(min(FREQUENCIES, size))])
    waves = waves / waves.norm(dim=1, keepdim=True)
    rows = F.conv2d(video, waves[:, None, :, None])
    columns = waves.repeat(len(waves), 1)[:, None, None, :]
    return F.conv2d(rows, columns, groups=len(waves))[:, 1:]
