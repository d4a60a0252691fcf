import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdm_cli.montage import PAPER, columns_of, enlarge, grid


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 3), (9, 3), (10, 4)])
def test_rows_and_columns(count, columns):
    assert columns_of(count) == columns


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]))
def test_every_video_stands_whole_in_its_cell(count, height, width, channels):
    frames = np.arange(count * height * width * channels).reshape(count, height, width, channels).astype(np.uint8)
    picture = grid(frames)
    columns = columns_of(count)
    rows = -(-count // columns)
    assert picture.shape == (rows * (height + 1) - 1, columns * (width + 1) - 1, channels)
    seen = np.zeros(picture.shape[:2], bool)
    for number, frame in enumerate(frames):
        top, left = number // columns * (height + 1), number % columns * (width + 1)
        assert np.array_equal(picture[top : top + height, left : left + width], frame)
        seen[top : top + height, left : left + width] = True
    assert (picture[~seen] == PAPER).all()


def test_enlarging_repeats_pixels():
    frame = np.array([[[1], [2]]], np.uint8)
    assert enlarge(frame, 1) is frame
    assert enlarge(frame, 3)[..., 0].tolist() == [[1, 1, 1, 2, 2, 2]] * 3
