from hypothesis import given
from hypothesis import strategies as st

from fdm_cli import frame_set
from fdm_cli.frame_set import FrameSet


@given(st.integers(1, 60), st.data())
def test_finds_what_a_plain_set_finds(length, data):
    blocks = frame_set._BLOCK
    frame_set._BLOCK = 4  # so that a short video has many blocks
    try:
        known = FrameSet(length)
        plain: set[int] = set()
        start = data.draw(st.integers(0, length))
        stop = data.draw(st.integers(start, length))
        known.add_range(start, stop)
        plain.update(range(start, stop))
        before = known.copy()
        more = sorted(data.draw(st.sets(st.integers(0, length - 1))) - plain)
        if more:
            known.add(more)
        assert before.count == len(plain)
        assert [frame for frame in range(length) if frame in before] == sorted(plain)
        plain.update(more)
        assert known.count == len(plain)
        for frame in range(length + 1):
            assert known.next_in(frame) == min((f for f in plain if f >= frame), default=-1)
            assert known.previous_in(frame) == max((f for f in plain if f < frame), default=-1)
            others = set(range(length)) - plain
            assert known.next_out(frame) == min((f for f in others if f >= frame), default=-1)
            assert known.previous_out(frame) == max((f for f in others if f < frame), default=-1)
            assert list(known.upwards(frame, length - 3)) == [f for f in sorted(plain) if frame <= f < length - 3]
            assert list(known.downwards(frame, 3)) == [f for f in sorted(plain, reverse=True) if 3 <= f < frame]
            assert known.count_between(frame, length) == len([f for f in plain if f >= frame])
    finally:
        frame_set._BLOCK = blocks
