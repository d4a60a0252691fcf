"""Frames that exist before a plan starts: as they are typed, where a scheme expects them, as ranges."""

from __future__ import annotations

from collections.abc import Sequence

from fdm_cli.errors import BadInput
from fdm_cli.scheme import Scheme, frame_range
from fdm_cli.yaml_file import Node

Span = range | tuple[int, int]

WHERE = {
    "first": "at the start",
    "last": "at the end",
    "ends": "at the start and at the end",
    "spread": "spread over the video",
    "closed": "at the start",
}

MOST_SPANS = 1_000_000  # of given frames that do not touch
SLOW_MOTION = 4  # times longer, where given frames are spread and no length is asked for


def place(scheme: Scheme, count: int, length: int, until: int = 0) -> tuple[tuple[int, int], ...]:
    """Where a clip's frames stand in the video, as the scheme says.

    Args:
        scheme: its `given` decides.
        count: how many frames the clip has.
        length: N, the frames of the whole video.
        until: how many frames a second clip has, for `ends`; they stand last.

    Raises:
        BadInput: more frames than the video has.
    """
    if count + until > length:
        raise BadInput(
            f"{count + until} given frames do not fit into a video of {length} frames",
            "the length counts the given frames too",
        )
    spans: list[Span] = [(0, count)]
    if scheme.given == "last":
        spans = [(length - count, length)]
    elif scheme.given == "spread" and count > 1:
        spans = [(at, at + 1) for at in (i * (length - 1) // (count - 1) for i in range(count))]
    if until:
        spans.append((length - until, length))
    return merge([span for span in spans if span[0] < span[1]], length)


def default_length(scheme: Scheme, count: int, until: int = 0) -> int:
    """N when the user does not say: the scheme's, or twice the given frames; four times slower where they are spread.

    Args:
        scheme: its `given` and `length` decide.
        count: how many frames the clip has.
        until: how many frames a second clip has.
    """
    if scheme.given == "spread" and count > 1:
        return SLOW_MOTION * (count - 1) + 1
    return max(scheme.length, 2 * (count + until))


def example(
    scheme: Scheme, *, length: int | None = None, window: int | None = None, step: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Given frames as the scheme expects them, to look at its plan without having any; () when it needs none."""
    if scheme.start is not None:
        return ()
    length = length or scheme.length
    step = default_step(scheme, window) if step is None else step
    few = max(1, min(step, length // 4))
    if scheme.given == "spread":
        return merge([range(0, length, max(2, step)), (length - 1, length)], length)
    return place(scheme, few, length, until=few if scheme.given == "ends" and length > 1 else 0)


def as_typed(given: Sequence[tuple[int, int]]) -> str:
    """Given frames as `--given` takes them; single frames equally far apart become one range."""
    parts: list[str] = []
    at = 0
    while at < len(given):
        start, stop = given[at]
        end = at + 1
        if stop - start == 1 and end < len(given):
            step = given[end][0] - start
            while end < len(given) and given[end] == (start + (end - at) * step, start + (end - at) * step + 1):
                end += 1
        if end - at > 2:
            parts.append(f"{start}:{given[end - 1][1]}:{step}")
        else:
            parts.append(f"{start}:{stop}")
            end = at + 1
        at = end
    return ",".join(parts)


def parse(text: str, length: int) -> tuple[tuple[int, int], ...]:
    """Given frames as they are typed: `8` is the first eight, `0:8,152:160` ranges, `::10` every tenth frame.

    Raises:
        BadInput: anything else, or frames outside of a video of `length` frames.
    """
    spans: list[Span] = []
    for part in text.split(","):
        if part.strip().isascii() and part.strip().isdigit() and len(part) < 12:
            count = int(part)
            spans.extend([(0, count)] if count else [])
            continue
        if ":" not in part:
            raise BadInput(
                f"--given: {part.strip()!r} is neither a number of frames nor start:stop:step",
                "8 is the first eight, -8: the last",
            )
        frames = frame_range(Node(part, "--given"))
        bounds = (frames.start or 0, frames.stop or 0)
        if max(bounds) > length or min(bounds) < -length:
            raise BadInput(
                f"--given: {part.strip()} is outside of a video of {length} frames",
                "the length counts the given frames too",
            )
        spans.append(frames.frames(length))
    return merge(spans, length)


def merge(given: Sequence[Span], length: int) -> tuple[tuple[int, int], ...]:
    """Ranges sorted and joined where they touch; BadInput when one leaves a video of `length` frames."""
    pairs: list[tuple[int, int]] = []
    for span in given:
        if isinstance(span, range) and span.step != 1:
            if len(span) > MOST_SPANS:
                shown = f"{span.start}:{span.stop}:{span.step}"
                raise BadInput(f"given frames {shown}: more than {MOST_SPANS:,} apart from each other")
            pairs.extend((frame, frame + 1) for frame in span)
            continue
        if isinstance(span, range):
            pairs.append((span.start, span.stop))
        else:
            pairs.append(span)
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(pairs):
        if start >= stop:
            raise BadInput(f"given frames {start}:{stop}: an empty range", "start:stop, stop not included")
        if start < 0 or stop > length:
            raise BadInput(
                f"given frames {start}:{stop} are outside of a video of {length} frames",
                "the length counts the given frames too",
            )
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def default_step(scheme: Scheme, window: int | None) -> int:
    """The scheme's step or, of another window, the same share."""
    return scheme.step if window is None else max(1, scheme.step * window // scheme.window)
