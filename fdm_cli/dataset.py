"""Training clips from what `--data` names: the built-in moving digits, a user's digits, or videos.

A source gives clips as a function of a generator and of the frames wanted, so that a training step reads
K frames of a clip of N, not N. Videos come from a cache (`clip_cache`), which is filled when it is not there yet.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fdm_cli import data_files, moving_mnist
from fdm_cli.clip_cache import CachedVideo, ClipCache, Decoding, Skipped
from fdm_cli.config import BUILT_IN, Config
from fdm_cli.errors import BadInput
from fdm_cli.files import expanded
from fdm_cli.moving_mnist import MovingMnist
from fdm_cli.video_info import KINDS

Split = Literal["train", "held-out"]


class Clips(Protocol):
    """A source of clips of N frames, fitted to the model's size and channels."""

    @property
    def clip_length(self) -> int:
        """N, the number of frames of every clip."""

    @property
    def longest(self) -> int | None:
        """How many frames a clip can have at most; None where there is no end."""

    @property
    def shortest(self) -> int | None:
        """How many frames a clip of any of the videos can have; None where there is no end."""

    @property
    def videos(self) -> int | None:
        """How many videos the clips come from; None where each clip is made anew."""

    @property
    def places(self) -> int | None:
        """How many different clips there are; None where each is made anew."""

    def of_length(self, clip_length: int) -> Clips:
        """Clips of another length from the same videos, but for those that are too short; at most `longest`."""

    def clip(self, generator: torch.Generator, frame_indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The frames (K,) of the clip that the generator draws, (K, H, W, C) uint8."""


@dataclass(frozen=True)
class VideoClips:
    """Clips of N frames out of videos of at least N.

    A video is drawn as often as it has frames, then every start within it is equally likely.

    Attributes:
        frames: (frames, H, W, C) uint8, memory-mapped, fitted to the model.
        starts: (videos,) int64, where each video begins in `frames`.
        lengths: (videos,) int64, how many frames it has.
        clip_length: N.
    """

    frames: NDArray[np.uint8]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    clip_length: int

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """The number of frames up to the end of each video."""
        return np.cumsum(self.lengths)

    @property
    def longest(self) -> int:
        """See Clips.longest."""
        return int(self.lengths.max())

    @property
    def shortest(self) -> int:
        """See Clips.shortest."""
        return int(self.lengths.min())

    @property
    def videos(self) -> int:
        """See Clips.videos."""
        return len(self.lengths)

    @property
    def places(self) -> int:
        """See Clips.places."""
        return int((self.lengths - self.clip_length + 1).sum())

    def of_length(self, clip_length: int) -> VideoClips:
        """See Clips.of_length."""
        if clip_length == self.clip_length:  # as for every clip that training draws, once windows have grown
            return self
        long_enough = self.lengths >= clip_length
        return VideoClips(self.frames, self.starts[long_enough], self.lengths[long_enough], clip_length)

    def clip(self, generator: torch.Generator, frame_indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See Clips.clip."""
        frame = int(torch.randint(int(self._ends[-1]), (), generator=generator))
        which = int(np.searchsorted(self._ends, frame, "right"))
        room = int(self.lengths[which]) - self.clip_length + 1
        start = int(self.starts[which]) + int(torch.randint(room, (), generator=generator))
        return np.asarray(self.frames[start + frame_indices])


@dataclass(frozen=True)
class Survey:
    """What a data source holds, once it has been decoded.

    Attributes:
        source: what `--data` named.
        unit: what is counted, "clips" or "digits".
        training, held_out: how many of them are trained on, and kept for the held-out loss.
        fingerprint: sha256 of the content that is trained on; the same wherever the files lie and however old they are.
        videos: those that are long enough.
        short: those that are not.
        skipped: files that could not be read.
        ignored: how many other files lie in the folder.
        cache: where the decoded frames are, or None.
    """

    source: str
    unit: Literal["clips", "digits"]
    training: int
    held_out: int
    fingerprint: str
    videos: tuple[CachedVideo, ...] = ()
    short: tuple[CachedVideo, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    ignored: int = 0
    cache: Path | None = None

    @property
    def frames(self) -> int:
        """Of the clips that are long enough."""
        return sum(entry.frames for entry in self.videos)

    def sizes(self) -> dict[str, int]:
        """How many clips have each size, width x height, before fitting; the most frequent first."""
        return dict(Counter(f"{entry.width}x{entry.height}" for entry in self.videos).most_common())

    def rates(self) -> dict[str, int]:
        """How many clips have each number of frames a second; the most frequent first."""
        return dict(Counter(f"{entry.fps:.4g}" for entry in self.videos).most_common())

    def kinds(self) -> dict[str, int]:
        """How many clips come from each kind of file; the most frequent first."""
        return dict(Counter(entry.kind for entry in self.videos).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        common = {
            "source": self.source,
            "unit": self.unit,
            "training": self.training,
            "held_out": self.held_out,
            "fingerprint": self.fingerprint,
        }
        if self.unit == "digits":
            return common
        return {
            **common,
            "frames": self.frames,
            "sizes": self.sizes(),
            "fps": self.rates(),
            "kinds": self.kinds(),
            "short": [{"name": entry.name, "frames": entry.frames} for entry in self.short],
            "skipped": [entry.message for entry in self.skipped],
            "ignored": self.ignored,
            "cache": str(self.cache),
        }


def decode(config: Config) -> Iterator[Decoding]:
    """Fills the cache of the videos that `data.source` names; yields nothing where there is nothing to do.

    Raises:
        BadInput: missing or unreadable source; with `data.strict`, an unreadable file in it.
        RunFailed: the cache cannot be written.
    """
    cache = _cache(config)
    if cache is not None:
        yield from cache.fill(strict=config.data.strict)


def open_clips(config: Config, split: Split = "train") -> Clips:
    """The clips that the configuration's `data.source` names, decoded first unless that has been done.

    One tenth is held out, the last one: digits 9,000 to 9,999 of the built-in ones, the last tenth of a
    user's digits or videos, at least one (none of a single video, which is then both).

    Raises:
        BadInput: as `decode`; no video is as long as `data.clip_length`.
        RunFailed: the cache cannot be written.
    """
    cache = _cache(config)
    if cache is None:
        return _digits(config, split)
    videos = _split(_long_enough(cache, config)[0], split)
    starts, lengths = (np.array([getattr(entry, name) for entry in videos]) for name in ("start", "frames"))
    return VideoClips(cache.frames, starts, lengths, config.data.clip_length)


def survey(config: Config) -> Survey:
    """What `data.source` holds. Raises as `open_clips`."""
    cache = _cache(config)
    source = config.data.source
    if cache is None:
        train, held_out = (_digits(config, split).digits for split in ("train", "held-out"))
        return Survey(source, "digits", len(train), len(held_out), hashlib.sha256(train.tobytes()).hexdigest())
    videos, short = _long_enough(cache, config)
    digest = hashlib.sha256()
    for entry in videos:
        # What the whole source is called says nothing of its content.
        name = "" if entry.name == cache.data.root.name else entry.name
        digest.update(f"{name!r} {entry.frames} {entry.digest}\n".encode())
    return Survey(
        source=source,
        unit="clips",
        training=len(_split(videos, "train")),
        held_out=len(_split(videos, "held-out")),
        fingerprint=digest.hexdigest(),
        videos=videos,
        short=short,
        skipped=cache.skipped,
        ignored=cache.data.ignored,
        cache=cache.folder,
    )


def _cache(config: Config) -> ClipCache | None:
    """The cache that belongs to the source, filled or not; None for digits."""
    source, model = config.data.source, config.model
    if source == BUILT_IN:
        return None
    path = expanded(source)
    if not path.exists():
        raise BadInput(
            f"no such file: {path}", f"--data takes a folder of videos, a file, or {BUILT_IN!r} for the built-in digits"
        )
    if path.is_file() and path.suffix.lower() not in KINDS and moving_mnist.is_idx(path):
        return None
    return ClipCache(data_files.find(path), model.image_size, model.image_channels)


def _long_enough(cache: ClipCache, config: Config) -> tuple[tuple[CachedVideo, ...], tuple[CachedVideo, ...]]:
    """The videos of a cache that are clips, and those that are too short; fills the cache when needed."""
    for _ in cache.fill(strict=config.data.strict):
        pass
    data, needed = cache.data, config.data.clip_length
    if cache.skipped and (config.data.strict or data.files == (data.root,)):
        raise BadInput(cache.skipped[0].message, cache.skipped[0].hint)
    videos = tuple(entry for entry in cache.videos if entry.frames >= needed)
    short = tuple(entry for entry in cache.videos if entry.frames < needed)
    if videos:
        return videos, short
    found = [f"{len(cache.skipped)} unreadable (the first: {cache.skipped[0].message})"] if cache.skipped else []
    if not short:
        raise BadInput(
            f"{data.root}: no videos there" + "".join(f": {text}" for text in found),
            f"known: {', '.join(KINDS)}, in folders however deep",
        )
    longest = max(entry.frames for entry in short)
    found.insert(0, f"{len(short)} shorter, the longest {longest}")
    raise BadInput(
        f"{data.root}: no clip has the {needed} frames of data.clip_length: {'; '.join(found)}",
        f"--set data.clip_length={longest}" if longest >= 2 else None,
    )


def _digits(config: Config, split: Split) -> MovingMnist:
    data, model = config.data, config.model
    built_in = data.source == BUILT_IN
    digits = moving_mnist.built_in_digits() if built_in else moving_mnist.read_idx(expanded(data.source))
    canvas = data.moving_mnist.canvas
    config.check_canvas()
    if max(digits.shape[1:]) > canvas:
        raise BadInput(f"digits of {digits.shape[1]} x {digits.shape[2]} do not fit on a canvas of {canvas}")
    return MovingMnist(
        _split(digits, split), data.moving_mnist, model.image_size, model.image_channels, data.clip_length
    )


def _split(items: Any, split: Split) -> Any:
    """The last tenth is held out; of fewer than two items, all are both."""
    if len(items) < 2:
        return items
    boundary = len(items) - max(1, len(items) // 10)
    return items[:boundary] if split == "train" else items[boundary:]
