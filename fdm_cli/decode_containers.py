"""MP4, MOV, Matroska, WebM, AVI -> frames: libav decodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from fdm_cli.decode_pictures import flatten
from fdm_cli.errors import BadInput
from fdm_cli.video_info import (
    BROKEN,
    DEMUXERS,
    MAX_VIDEO_PIXELS,
    Frame,
    Video,
    VideoInfo,
    check_size,
    kind_of,
    take,
)

PACKETS_MEASURED = 300  # for a rate that the file does not say
# The outermost boxes of ISO base media and QuickTime files.
BOXES = {b"ftyp", b"styp", b"moov", b"mdat", b"moof", b"mfra", b"sidx", b"ssix", b"prft", b"emsg", b"pdin", b"meta",
         b"free", b"skip", b"wide", b"pnot", b"udta", b"uuid"}  # fmt: skip


def open_container(path: Path) -> Video:
    """The first video stream of an MP4, MOV, Matroska, WebM or AVI; raises as `video.read` does."""
    import av

    kind = kind_of(path)
    with path.open("rb") as file:
        if _is_truncated(kind, file, path.stat().st_size):
            raise BadInput(f"{path}: truncated", BROKEN)

    def opened() -> Any:
        # Titles and the like, of no use here, may be in any encoding.
        return av.open(str(path.absolute()), format=DEMUXERS[kind], metadata_errors="replace")

    with opened() as container:
        if not container.streams.video:
            raise BadInput(f"{path}: holds no pictures", "it has sound only")
        stream = container.streams.video[0]
        rate = stream.average_rate
        if not rate:
            with opened() as another:
                rate = _measured_rate(another)
        if not rate:
            raise BadInput(f"{path}: does not say its frame rate", BROKEN)
        seconds = container.duration / av.time_base if container.duration else 0
        check_size(path, stream.width, stream.height, stream.frames or math.ceil(seconds * rate), MAX_VIDEO_PIXELS)
        first = next(_upright(container, grey=False), None)
        if first is None:
            raise BadInput(f"{path}: holds no frames", BROKEN)
        grey = stream.codec_context.pix_fmt.startswith("gray")
        info = VideoInfo(
            path=path,
            kind=kind,
            frames=stream.frames or None,
            height=first.shape[0],
            width=first.shape[1],
            channels=1 if grey else 3,
            fps=float(rate),
            has_sound=bool(container.streams.audio),
        )

    def decode() -> Iterator[Frame]:
        with opened() as container:
            yield from _upright(container, grey=grey)

    return Video(info, decode)


def _measured_rate(container: Any) -> Fraction | None:
    """Frames a second of what does not say it, as browsers record: by the times of the first few hundred.

    What libav guesses of such a file is the unit of its times, often a thousand a second.
    """
    stream = container.streams.video[0]
    packets = islice(container.demux(stream), PACKETS_MEASURED)
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(times) > 1 and max(times) > min(times):
        return (len(times) - 1) / ((max(times) - min(times)) * Fraction(stream.time_base))
    return Fraction(stream.guessed_rate) if stream.guessed_rate else None


def _upright(container: Any, *, grey: bool) -> Iterator[Frame]:
    """The frames of the first video stream, turned as the camera was held."""
    container.streams.video[0].thread_type = "AUTO"
    for frame in container.decode(video=0):
        if any(component.is_alpha for component in frame.format.components):
            image = flatten(frame.to_ndarray(format="rgba"), grey=grey)
        else:
            image = frame.to_ndarray(format="gray" if grey else "rgb24")
            image = image[..., None] if grey else image
        yield np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90))) if frame.rotation else image


def _is_truncated(kind: str, file: IO[bytes], held: int) -> bool:
    """Whether a container's outermost lengths reach over the `held` bytes of its file; libav would just stop there."""
    if kind == "AVI":
        return bool(take(file, "<4xI")[0] + 8 > held)
    position, seen = 0, set[bytes]()
    while position < held:
        file.seek(position)
        if kind == "MP4":
            name = file.read(8)[4:]  # of what may be appended to the last box, and shorter than a header
            if seen >= {b"moov", b"mdat"} and name not in BOXES:  # by cameras; no player reads it
                return False
            seen.add(name)
            file.seek(position)
            length: int = take(file, ">I4x")[0]
            if length == 1:
                length = take(file, ">Q")[0]
            if length < 8:  # 0: the box reaches to the end of the file
                return length != 0
            position += length
        else:
            _vint(file)
            size = _vint(file)
            if size is None:  # a live recording, which does not say
                return False
            position = file.tell() + size
    return position > held


def _vint(file: IO[bytes]) -> int | None:
    """A Matroska number of variable length; None where all its bits are set: unknown."""
    first = file.read(1)
    more = 8 - first[0].bit_length()
    mask = (1 << 7 * (more + 1)) - 1
    number = int.from_bytes(first + file.read(more), "big") & mask
    return None if number == mask else number
