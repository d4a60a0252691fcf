import dataclasses

import numpy as np
import pytest

from fdm_cli import config as configuration
from fdm_cli.dataset import open_clips, read_videos
from fdm_cli.errors import BadInput
from fdm_cli.randomness import generator


def config(source, **data):
    base = configuration.load_preset("moving-mnist")
    return dataclasses.replace(base, data=dataclasses.replace(base.data, source=str(source), **data))


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ((40, 12, 10), (1, 40, 12, 10, 1)),
        ((40, 12, 10, 3), (1, 40, 12, 10, 3)),
        ((5, 40, 12, 10), (5, 40, 12, 10, 1)),
        ((5, 40, 12, 10, 3), (5, 40, 12, 10, 3)),
        ((20, 100, 64, 64), (100, 20, 64, 64, 1)),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_shapes_of_array_files(tmp_path, shape, read, suffix):
    path = tmp_path / f"clips{suffix}"
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, frames=array, fps=10.0)
    assert read_videos(path).shape == read


def test_clips_of_an_array_are_windows_of_its_videos(tmp_path):
    videos = np.broadcast_to(np.arange(50, dtype=np.uint8)[None, :, None, None], (20, 50, 32, 32)).copy()
    np.save(tmp_path / "clips.npy", videos)
    clips = open_clips(config(tmp_path / "clips.npy"))
    starts = set()
    for number in range(40):
        frames = clips.clip(generator(number), np.array([0, 7, 29]))
        assert frames.shape == (3, 32, 32, 1)
        values = frames[:, 0, 0, 0].astype(int)
        assert (values - values[0]).tolist() == [0, 7, 29]
        starts.add(values[0])
    assert len(starts) > 5
    assert min(starts) >= 0
    assert max(starts) <= 20


def test_training_and_held_out_digits_are_apart():
    train, held_out = (open_clips(config("moving-mnist"), split) for split in ("train", "held-out"))
    assert len(train.digits) == 9000
    assert len(held_out.digits) == 1000
    known = {digit.tobytes() for digit in train.digits}
    assert not any(digit.tobytes() in known for digit in held_out.digits)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.npy", None, "no such file"),
        ("text.npy", b"hello", "cannot be read"),
        ("empty.npz", b"", "cannot be read"),
        ("digits.bin", b"hello", "not a kind of data"),
    ],
)
def test_a_source_that_is_no_data(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=says):
        open_clips(config(path))


def test_clips_that_do_not_fit(tmp_path):
    np.save(tmp_path / "short.npy", np.zeros((4, 10, 32, 32), np.uint8))
    with pytest.raises(BadInput, match="its clips have 10 frames") as caught:
        open_clips(config(tmp_path / "short.npy"))
    assert caught.value.hint == "--set data.clip_length=10"
    np.save(tmp_path / "float.npy", np.zeros((4, 10, 32, 32)))
    with pytest.raises(BadInput, match="not uint8"):
        read_videos(tmp_path / "float.npy")
    np.save(tmp_path / "flat.npy", np.zeros((4, 10), np.uint8))
    with pytest.raises(BadInput, match="no set of clips"):
        read_videos(tmp_path / "flat.npy")


def test_pickled_arrays_are_never_opened(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match="cannot be read"):
        read_videos(tmp_path / "objects.npy")
