import gzip
import struct

import numpy as np
import pytest

from fdm_cli.config import MovingMnistConfig
from fdm_cli.errors import BadInput
from fdm_cli.moving_mnist import MovingMnist, built_in_digits, is_idx, read_idx
from fdm_cli.randomness import generator


def clips(size=64, length=160, **config) -> MovingMnist:
    return MovingMnist(built_in_digits(), MovingMnistConfig(**config), size, 1, length)


def test_the_digits_are_mnist():
    digits = built_in_digits()
    assert digits.shape == (10_000, 28, 28)
    assert digits.dtype == np.uint8
    # Known of the MNIST test set: mean 0.1325 and standard deviation 0.3105 of the pixel range.
    assert abs(digits.mean() / 255 - 0.1325) < 1e-3
    assert abs(digits.std() / 255 - 0.3105) < 1e-3


def test_a_clip_is_a_function_of_its_generator_and_of_the_frames_asked_for():
    whole = clips().clip(generator(1), np.arange(160))
    assert whole.shape == (160, 64, 64, 1)
    some = np.array([3, 50, 159])
    assert np.array_equal(clips().clip(generator(1), some), whole[some])
    assert not np.array_equal(clips().clip(generator(2), some), whole[some])


def test_a_digit_moves_straight_and_bounces():
    """One digit: its ink never leaves the canvas, and between bounces its corner moves by equal steps."""
    frames = clips(digits=1).clip(generator(7), np.arange(60))[..., 0]
    ink = frames.reshape(60, -1).sum(1, dtype=np.int64)
    assert (ink == ink[0]).all()
    rows = np.array([np.flatnonzero(frame.any(axis=1))[0] for frame in frames])
    steps = np.diff(rows)
    largest = np.abs(steps).max()
    assert largest <= np.ceil(0.1 * 36)
    turns = np.flatnonzero(np.abs(np.diff(steps)) > 1)
    assert len(turns) <= 2 * (60 * 0.1 + 1)
    assert len(turns) > 0


def test_smaller_frames_are_averages():
    frames = np.arange(4)
    large = clips().clip(generator(3), frames)[..., 0].astype(float)
    small = clips(size=32).clip(generator(3), frames)[..., 0]
    blocks = large.reshape(4, 32, 2, 32, 2).mean(axis=(2, 4))
    assert np.abs(small - blocks).max() <= 0.5


@pytest.mark.parametrize("packed", [False, True])
def test_a_user_s_idx_file(tmp_path, packed):
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 24), np.uint8)
    data = struct.pack(">IIII", 0x803, 5, 20, 24) + images.tobytes()
    path = tmp_path / "digits-idx3-ubyte"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert is_idx(path)
    assert np.array_equal(read_idx(path), images)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not an IDX file"),
        (b"hello, I am a text file", "not an IDX file"),
        (struct.pack(">IIII", 0x803, 5, 20, 24), "the file holds 0"),
        (struct.pack(">IIII", 0x803, 1 << 20, 1 << 10, 1 << 10), "claims"),
        (gzip.compress(struct.pack(">IIII", 0x803, 5, 20, 24) + bytes(2400), mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_broken_idx_file_is_refused(tmp_path, data, says):
    path = tmp_path / "digits"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=says):
        read_idx(path)
