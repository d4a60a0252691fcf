"""A growing set of frames that finds its nearest members at once, even among a million.

Planning asks again and again for the nearest known or unknown frame. One byte a frame, searched with
`bytes.find`, answers in the time of a memory scan; a second row of bytes, one for each block of frames,
keeps that scan short however long the video is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

_BLOCK = 4096


class FrameSet:
    """A set of frames out of `0 .. length - 1`; frames are added, never removed.

    Args:
        length: the number of frames of the video.
    """

    __slots__ = ("_any", "_counts", "_full", "_member", "count", "length")

    def __init__(self, length: int) -> None:
        blocks = (length + _BLOCK - 1) // _BLOCK
        self.length = length
        self.count = 0
        self._member = bytearray(length)
        self._counts = [0] * blocks
        self._any = bytearray(blocks)
        self._full = bytearray(blocks)

    def copy(self) -> FrameSet:
        """The set as it is now, unmoved by what is added later."""
        other = FrameSet(0)
        other.length, other.count = self.length, self.count
        other._member = self._member[:]
        other._counts = self._counts[:]
        other._any, other._full = self._any[:], self._full[:]
        return other

    def __contains__(self, frame: int) -> bool:
        return bool(self._member[frame])

    def add(self, frames: Sequence[int]) -> None:
        """Adds frames, sorted, that are not in the set."""
        member, counts = self._member, self._counts
        self.count += len(frames)
        for frame in frames:
            member[frame] = 1
        if (first := frames[0] // _BLOCK) == frames[-1] // _BLOCK:
            counts[first] += len(frames)
            self._summarize(first)
        else:
            for frame in frames:
                counts[frame // _BLOCK] += 1
                self._summarize(frame // _BLOCK)

    def add_range(self, start: int, stop: int) -> None:
        """Adds the frames `start .. stop - 1`, of which none is in the set."""
        self._member[start:stop] = b"\1" * (stop - start)
        self.count += stop - start
        for block in range(start // _BLOCK, -(-stop // _BLOCK) if stop > start else 0):
            self._counts[block] += min(stop, (block + 1) * _BLOCK) - max(start, block * _BLOCK)
            self._summarize(block)

    def _summarize(self, block: int) -> None:
        self._any[block] = 1
        if self._counts[block] == min(_BLOCK, self.length - block * _BLOCK):
            self._full[block] = 1

    def count_of(self, frames: Iterable[int]) -> int:
        """How many of the frames are in the set."""
        return sum(map(self._member.__getitem__, frames))

    def next_in(self, frame: int) -> int:
        """The first member at `frame` or after it; -1 when there is none."""
        found = self._member.find(1, frame, frame + _BLOCK)
        return found if found >= 0 else self._search_up(self._any, 1, 1, frame)

    def next_out(self, frame: int) -> int:
        """The first frame at `frame` or after it that is not in the set; -1 when there is none."""
        found = self._member.find(0, frame, frame + _BLOCK)
        return found if found >= 0 else self._search_up(self._full, 0, 0, frame)

    def previous_in(self, frame: int) -> int:
        """The last member before `frame`; -1 when there is none."""
        found = self._member.rfind(1, frame - _BLOCK if frame > _BLOCK else 0, frame)
        return found if found >= 0 else self._search_down(self._any, 1, 1, frame)

    def previous_out(self, frame: int) -> int:
        """The last frame before `frame` that is not in the set; -1 when there is none."""
        found = self._member.rfind(0, frame - _BLOCK if frame > _BLOCK else 0, frame)
        return found if found >= 0 else self._search_down(self._full, 0, 0, frame)

    def upwards(self, frame: int, stop: int) -> Iterator[int]:
        """The members from `frame` to below `stop`, upwards."""
        find = self._member.find
        while True:
            found = find(1, frame, frame + _BLOCK)
            if found < 0:
                found = self._search_up(self._any, 1, 1, frame)
            if not 0 <= found < stop:
                return
            yield found
            frame = found + 1

    def downwards(self, frame: int, stop: int) -> Iterator[int]:
        """The members below `frame` but not below `stop`, downwards."""
        rfind = self._member.rfind
        while True:
            found = rfind(1, frame - _BLOCK if frame > _BLOCK else 0, frame)
            if found < 0:
                found = self._search_down(self._any, 1, 1, frame)
            if found < stop:
                return
            yield found
            frame = found

    def count_between(self, start: int, stop: int) -> int:
        """How many members there are among `start .. stop - 1`."""
        return self._member.count(1, start, stop)

    def _search_up(self, summary: bytearray, promising: int, wanted: int, frame: int) -> int:
        """Continues in the blocks after `frame`'s own, where nothing was found within a block's length."""
        block = summary.find(promising, frame // _BLOCK + 1)
        return -1 if block < 0 else self._member.find(wanted, block * _BLOCK, (block + 1) * _BLOCK)

    def _search_down(self, summary: bytearray, promising: int, wanted: int, frame: int) -> int:
        """Continues in the blocks before `frame`'s own, where nothing was found within a block's length."""
        if frame <= _BLOCK:
            return -1
        block = summary.rfind(promising, 0, (frame - _BLOCK) // _BLOCK + 1)
        return -1 if block < 0 else self._member.rfind(wanted, block * _BLOCK, (block + 1) * _BLOCK)
