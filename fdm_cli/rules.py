"""The rules of the scheme language at work: which frames a window makes, which it looks at.

Generate rules are generators over a `Board`, the state of a plan in the making: each yields the latent frames
of one window after the other, while the planner marks them as known in between. Observe rules read the known
frames nearest to a window. Neither checks more than that it holds no endless list: `plan.py` does, whatever the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Protocol

from fdm_cli.errors import BadInput
from fdm_cli.frame_set import FrameSet
from fdm_cli.scheme import Amount, FrameRange, Observe, Round, Start

_LONG_RANGE = 100_000


@dataclass(slots=True)
class Board:
    """Which frames are known while a plan is made.

    Attributes:
        length, window, step: the plan's, in frames.
        closed: time is a circle; frame 0 follows the last.
        known: given frames and those of the stages so far.
        visible: what a window may observe now: `known`, or what was known before a parallel round began.
        origin: the frames the video started from, in order: the given ones, else the first window.
    """

    length: int
    window: int
    step: int
    closed: bool
    known: FrameSet
    visible: FrameSet
    origin: Sequence[int] = field(default_factory=tuple)


class _Rule(Protocol):
    def __call__(self, board: Board, /) -> Iterator[tuple[int, list[int]]]: ...


def start(rule: Start, length: int, window: int, closed: bool) -> list[int]:
    """The first window when nothing is given: the first frames, or frames spread over the whole video.

    The first frames of a closed video are at most half of it: the others have to lead back to them.
    """
    if rule == "contiguous":
        return list(range(min((length + 1) // 2 if closed else length, window)))
    if window == 1 or length == 1:
        return [0]
    spacing = (length - 1) / (window - 1)
    frames = [int(i * spacing) for i in range(window - 1)]
    return sorted({*frames, length - 1})


def pieces(frames: Sequence[int], first: int | None) -> Iterator[tuple[list[int], list[int]]]:
    """A window that observes nothing, in one piece or several: what is known of it by then, and what a piece makes.

    Args:
        frames: of the window.
        first: how many the first piece makes; each other makes as many as are known. None is all of them.
    """
    done, count = 0, first or len(frames)
    while done < len(frames):
        yield list(frames[:done]), list(frames[done : done + count])
        done += count
        count = done


def generate(board: Board, item: Round) -> Iterator[tuple[int, list[int]]]:
    """The windows of a round: pairs of a pass and the latent frames, in order.

    A parallel round observes what was known when the present pass began. Most rules have one pass; each level
    of `levels`, and each round of splitting in `gaps`, is one.
    """
    rule = item.generate
    if rule.rule == "levels":
        return _levels(board, rule.levels)
    if rule.rule == "frames":
        return _frames(board, rule.ranges)
    return _RULES[rule.rule](board)


def _next(board: Board) -> Iterator[tuple[int, list[int]]]:
    """Up to `step` unknown frames in a row, the first ones that follow a known frame."""
    known = board.known
    frame = known.next_in(0)
    while frame >= 0 and (first := known.next_out(frame)) >= 0:
        stop = known.next_in(first)
        frame = first + board.step if stop < 0 else min(first + board.step, stop)
        frame = min(frame, board.length)
        yield 0, list(range(first, frame))


def _previous(board: Board) -> Iterator[tuple[int, list[int]]]:
    """`_next` backwards: up to `step` unknown frames in a row, the last ones that precede a known frame."""
    known = board.known
    frame = known.previous_in(board.length)
    while frame >= 0 and (last := known.previous_out(frame)) >= 0:
        frame = max(last - board.step, known.previous_in(last)) + 1
        yield 0, list(range(frame, last + 1))


def _spread(board: Board) -> Iterator[tuple[int, list[int]]]:
    """One window of `step` frames spread evenly from the first unknown frame to the last.

    The paper's first level: `int` of linspace(first, last + 0.999), in whole numbers. A step of 1 takes the last.
    """
    known = board.known
    first = known.next_out(0)
    if first < 0:
        return
    last = known.previous_out(board.length)
    places = _evenly(first, last, board.step) if board.step > 1 else [last]
    yield 0, sorted({known.next_out(place) for place in places})


def _gaps(board: Board) -> Iterator[tuple[int, list[int]]]:
    """Every run of unknown frames between known ones, a window each.

    A run longer than `window - 2` is split first by frames spread evenly in it, as few as let every window have
    its place in as few passes as possible. With b = window - 1, d passes of splitting reach runs of b^(d+1) - 1.
    """
    known = board.known
    largest = max(1, board.window - 2)
    if not known.count:
        return
    depth = 0
    found = True
    while found:
        found = False
        first = known.next_out(0)
        while first >= 0:
            stop = known.next_in(first)
            if board.closed or (first > 0 and stop > 0):
                found = True
                yield depth, _part_of_gap(first, stop if stop > 0 else board.length, largest)
            if stop < 0:
                break
            first = known.next_out(stop)
        depth += 1


def _part_of_gap(first: int, stop: int, largest: int) -> list[int]:
    """The frames that fill the unknown run `first .. stop - 1` or, if it is too long, that split it."""
    size = stop - first
    if size <= largest:
        return list(range(first, stop))
    reach = largest + 1
    while reach * (largest + 1) <= size:
        reach *= largest + 1
    parts = -(-(size + 1) // reach)
    return [first - 1 + i * (size + 1) // parts for i in range(1, parts)]


def _levels(board: Board, levels: int) -> Iterator[tuple[int, list[int]]]:
    """The paper's hierarchy below its first level, which the first window or a `spread` round has made.

    The spacing at level l of L is int(x ** ((L - l) / (L - 1))) with x = (N - origin frames) / (step - 1): it
    shrinks from level to level, down to 1 at the last. A window begins one spacing after the last frame made and
    takes `step` unknown frames a spacing apart; a known frame in the way is stepped over by one. When nothing
    unknown is left from there on, the next level begins one spacing after the frame before the first unknown one.
    A window ends early where its frames and the known ones between them would not fit.
    """
    known = board.known
    ratio = (board.length - len(board.origin)) / max(1, board.step - 1)
    for level in range(2, levels + 1):
        spacing = max(1, int(ratio ** ((levels - level) / (levels - 1))))
        first = known.next_out(0)
        if first < 0:
            return
        frame = known.next_out(first - 1 + spacing)
        while frame >= 0:
            latent = [frame]
            used = 1
            while len(latent) < board.step:
                following = known.next_out(frame + spacing)
                if following < 0:
                    break
                used += 1 if following == frame + 1 else 1 + known.count_between(frame + 1, following)
                if used > board.window:
                    break
                latent.append(following)
                frame = following
            yield level, latent
            frame = known.next_out(frame + spacing)


def _frames(board: Board, ranges: tuple[FrameRange, ...]) -> Iterator[tuple[int, list[int]]]:
    """One window of the named frames, those left out that are known already."""
    known = board.known
    wanted: set[int] = set()
    named = 0
    for item in ranges:
        frames = _limited(item, board)
        named += len(frames)
        if named > 10 * board.length + _LONG_RANGE:
            raise BadInput(f"{item.where}: {item} and those before it name the same frames over and over")
        wanted.update(frame for frame in frames if frame not in known)
    if wanted:
        yield 0, sorted(wanted)


def _limited(item: FrameRange, board: Board) -> range:
    """The range's frames, refused here before a set of millions is made of a range that cannot fit anyway."""
    frames = item.frames(board.length)
    if len(frames) > _LONG_RANGE + board.known.count:
        raise BadInput(
            f"{item.where}: {item} names {len(frames):,} frames, more than fit into a window of {board.window}",
            "name fewer frames, or use next, gaps or levels, which take as many windows as needed",
        )
    return frames


def observe(board: Board, item: Round, latent: list[int]) -> tuple[list[int], int]:
    """What a window looks at: the frames, and how many more are to be chosen at run time.

    A window of `next`, `previous`, `spread` and `levels` has `window - step` places for observed frames, so that
    a short last window sees as much as the others; one of `gaps` and `frames` has what its latent frames leave.
    """
    room = board.window - len(latent)
    places = room if item.generate.rule in ("gaps", "frames") else min(room, board.window - board.step)
    chosen: dict[int, None] = {}
    for rule in item.observe:
        limit = len(chosen) + _limit(rule.amount, places - len(chosen), room - len(chosen))
        if rule.rule == "diverse":
            return _diverse(board, list(chosen), limit - len(chosen))
        if rule.rule == "frames":
            chosen.update((frame, None) for part in rule.ranges for frame in _few(part, board))
            continue
        candidates = iter(_candidates(board, rule, latent, limit - len(chosen)))
        while (missing := limit - len(chosen)) > 0 and (found := list(islice(candidates, missing))):
            chosen.update(dict.fromkeys(found))
    return list(chosen), 0


def _few(part: FrameRange, board: Board) -> range:
    frames = part.frames(board.length)
    if len(frames) > board.window:
        raise BadInput(f"{part.where}: {part} names {len(frames):,} frames, more than a window of {board.window}")
    return frames


def _limit(amount: Amount, free: int, room: int) -> int:
    free = max(0, free)
    if amount.kind == "count":
        return min(amount.value, free)
    if amount.kind == "share":
        return free * amount.value // 100
    return free if amount.kind == "rest" else max(0, room)


def _diverse(board: Board, chosen: list[int], wanted: int) -> tuple[list[int], int]:
    """As many as are wanted, left to run time; with no more known frames than that there is no choice to make.

    What is chosen already stays so, even if it is not known: a `frames` rule that cannot be followed is to be refused.
    """
    others = board.visible.count - len(chosen)
    if others > wanted:
        return chosen, max(0, wanted)
    return list(dict.fromkeys([*chosen, *board.visible.upwards(0, board.length)])), 0


def _candidates(board: Board, rule: Observe, latent: list[int], count: int) -> Iterable[int]:
    """Known frames in the rule's order of preference; frames chosen by an earlier rule may come again."""
    first, last = latent[0], latent[-1]
    if rule.rule == "before":
        return _before(board, first, last)
    if rule.rule == "after":
        return _after(board, first, last)
    if rule.rule == "between":
        return board.visible.upwards(first + 1, last)
    if rule.rule == "nearest":
        return chain(board.visible.upwards(first + 1, last), _nearest(board, first, last))
    if rule.rule == "latest":
        return board.visible.downwards(board.length, 0)
    if rule.rule == "origin":
        return reversed(board.origin)
    return _spread_known(board, count)


def _before(board: Board, first: int, last: int) -> Iterator[int]:
    """Known frames before the window, the nearest first; on a circle those beyond the start follow."""
    known = board.visible
    found = known.downwards(first, 0)
    return chain(found, known.downwards(board.length, last + 1)) if board.closed else found


def _after(board: Board, first: int, last: int) -> Iterator[int]:
    """Known frames after the window, the nearest first; on a circle those beyond the end follow."""
    known = board.visible
    found = known.upwards(last + 1, board.length)
    return chain(found, known.upwards(0, first)) if board.closed else found


def _nearest(board: Board, first: int, last: int) -> Iterator[int]:
    """Known frames around the window, the nearest first, the earlier of two that are equally near."""
    length = board.length
    before, after = _before(board, first, last), _after(board, first, last)
    left, right = next(before, None), next(after, None)
    while left is not None or right is not None:
        left_far = length if left is None else (first - left) % length
        right_far = length if right is None else (right - last) % length
        if left is not None and left_far <= right_far:
            yield left
            left = next(before, None)
        elif right is not None:
            yield right
            right = next(after, None)


def _spread_known(board: Board, count: int) -> Iterator[int]:
    """Evenly in time over what is known: at each place the known frame there or before it."""
    known = board.visible
    first = known.next_in(0)
    if first >= 0:
        for place in _evenly(first, known.previous_in(board.length), count):
            yield known.previous_in(place + 1)


def _evenly(first: int, last: int, count: int) -> Iterator[int]:
    """`int` of linspace(first, last + 0.999, count), in whole numbers."""
    thousandths = 1000 * (last - first) + 999
    for i in range(count):
        yield first + i * thousandths // (1000 * max(1, count - 1))


_RULES: dict[str, _Rule] = {"next": _next, "previous": _previous, "spread": _spread, "gaps": _gaps}
