import io
import math
import zipfile

import numpy as np
import pytest

from fdm_cli.data_files import find, open_videos, read_array, sources
from fdm_cli.errors import BadInput
from tests import clips


def names(folder):
    data = find(folder)
    return [data.relative(source.path) for source in sources(data)]


def test_files_come_in_natural_order_from_folders_however_deep(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("clip-10.gif", "clip-9.gif", "Clip-1.mp4", "b/1.npy", "b/c/2.webm", "z.txt", ".x.gif", ".git/a.gif"):
        (tmp_path / name).touch()
    assert names(tmp_path) == ["b/1.npy", "b/c/2.webm", "Clip-1.mp4", "clip-9.gif", "clip-10.gif"]
    assert find(tmp_path).ignored == 1


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.gif").touch()
    data = tmp_path / "data"
    data.mkdir()
    (data / "link").symlink_to(tmp_path / "elsewhere")
    (data / "loop").symlink_to(data)
    assert names(data) == ["link/a.gif"]


def test_a_folder_keeps_its_own_name_whatever_links_to_it(tmp_path):
    data = tmp_path / "data"
    (data / "m").mkdir(parents=True)
    (data / "m" / "a.gif").touch()
    for name in ("a", "z"):
        (data / name).symlink_to(data / "m")
    assert names(data) == ["m/a.gif"]


def test_what_training_itself_writes_is_no_data(tmp_path):
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "samples").mkdir()
    for name in ("runs/mine/config.yaml", "runs/mine/samples/step-1.gif", "data.clips.png", "good.gif"):
        (tmp_path / name).touch()
    assert names(tmp_path) == ["good.gif"]


def test_still_images_of_a_folder_are_one_video(tmp_path):
    frames = clips.moving_square(12, 10, 14)
    clips.write_images(tmp_path / "one", frames)
    clips.write_images(tmp_path / "two", frames, ".jpg")
    clips.write_pictures(tmp_path / "clip.gif", frames)
    assert names(tmp_path) == ["clip.gif", "one", "two"]
    (source,) = [source for source in sources(find(tmp_path)) if source.path.name == "one"]
    (video,) = open_videos(source, tmp_path / "scratch")
    assert np.array_equal(np.stack(list(video)), frames)


def test_animated_images_of_a_folder_are_a_video_each(tmp_path):
    for number in range(2):
        clips.write_pictures(tmp_path / f"{number}.png", clips.moving_square(5, 10, 14, number))
        clips.write_pictures(tmp_path / f"{number}.webp", clips.moving_square(5, 10, 14, number))
    assert names(tmp_path) == ["0.png", "0.webp", "1.png", "1.webp"]


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ((40, 12, 10), (1, 40, 12, 10, 1)),
        ((40, 12, 10, 3), (1, 40, 12, 10, 3)),
        ((5, 40, 12, 10), (5, 40, 12, 10, 1)),
        ((5, 40, 12, 10, 3), (5, 40, 12, 10, 3)),
        ((20, 100, 64, 64), (20, 100, 64, 64, 1)),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_shapes_of_array_files(tmp_path, shape, read, suffix):
    path = tmp_path / f"clips{suffix}"
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, frames=array, fps=25.0)
    videos, fps = read_array(path, tmp_path / "scratch")
    assert videos.shape == read
    assert fps == (10.0 if suffix == ".npy" else 25.0)
    assert np.array_equal(np.asarray(videos).ravel(), array.ravel())


def test_the_classic_moving_mnist_file_has_its_frames_first(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "mnist.npy", "w+", np.uint8, (20, 10_000, 64, 64))  # of zeros, sparse
    array[3, 7_000] = 200
    array.flush()
    videos, _ = read_array(tmp_path / "mnist.npy", tmp_path / "scratch")
    assert videos.shape == (10_000, 20, 64, 64, 1)
    assert (videos[7_000, 3] == 200).all()
    assert not videos[7_000, 4].any()


def test_an_array_of_clips_is_many_videos(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 7, 12, 10, 3), np.uint8)
    np.savez_compressed(tmp_path / "clips.npz", array)
    (source,) = sources(find(tmp_path / "clips.npz"))
    videos = list(open_videos(source, tmp_path / "scratch"))
    assert np.array_equal(np.stack([np.stack(list(video)) for video in videos]), array)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 10, 32, 32)), "not uint8"),
        (np.zeros((4, 10), np.uint8), "no set of clips"),
        (np.zeros((0, 10, 10), np.uint8), "no set of clips"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),
    ],
)
def test_arrays_that_are_no_clips(tmp_path, array, says):
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    with pytest.raises(BadInput, match=says):
        read_array(tmp_path / "array.npy", tmp_path / "scratch")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"a": np.zeros((4, 9, 9), np.uint8), "b": np.zeros(3)}, "no array 'frames' and 2 others"),
        ({"frames": np.zeros((4, 9, 9), np.uint8), "fps": 0.0}, "its rate is 0.0"),
        ({"frames": np.zeros((4, 9, 9), np.uint8), "fps": np.nan}, "its rate is nan"),
        ({"frames": np.zeros((4, 9, 9), np.uint8), "fps": "fast"}, "fps is no number"),
        ({"frames": np.zeros((4, 9, 9), np.uint8), "fps": [10.0, 12.0]}, "fps is no number"),
        ({}, "no array 'frames' and 0 others"),
    ],
)
def test_npz_files_that_are_no_clips(tmp_path, arrays, says):
    np.savez(tmp_path / "arrays.npz", **arrays)
    with pytest.raises(BadInput, match=says):
        read_array(tmp_path / "arrays.npz", tmp_path / "scratch")


def test_an_npz_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr("fdm_cli.data_files.MAX_UNPACKED", 1000)
    np.savez_compressed(tmp_path / "a.npz", frames=np.zeros((40, 9, 9), np.uint8))
    with pytest.raises(BadInput, match="unpacks to more than"):
        read_array(tmp_path / "a.npz", tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(("shape", "packing"), [((50_000_000, 1, 1), "DEFLATED"), ((2000, 50, 50), "BZIP2")])
def test_an_npz_of_more_than_any_video_has(tmp_path, monkeypatch, shape, packing):
    monkeypatch.setattr("fdm_cli.data_files.LONG_WORK", 1_000_000)  # before it is unpacked
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", getattr(zipfile, f"ZIP_{packing}")) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(math.prod(shape)))
    with pytest.raises(BadInput, match="which is no real video"):
        read_array(tmp_path / "a.npz", tmp_path / "scratch")
    assert (tmp_path / "scratch").exists() == (packing == "DEFLATED")


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_every_damaged_array_is_refused_or_read_whole(tmp_path, name):
    """Truncated at, or with a byte changed at, positions all over the file."""
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
    good = tmp_path / name
    np.save(good, array) if name == "a.npy" else np.savez_compressed(good, frames=array)
    data = good.read_bytes()
    refused = 0
    for position in range(0, len(data), 7):
        for damaged in (data[:position], data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]):
            good.write_bytes(damaged)
            try:
                read_array(good, tmp_path / "scratch")
            except BadInput:
                refused += 1
    assert refused > len(data) / 7


def test_a_sheet_among_the_frames_is_none_of_them(tmp_path):
    clips.write_pictures(tmp_path / "one.png", clips.moving_square(1, 8, 8))
    clips.write_pictures(tmp_path / "data.clips.png", clips.moving_square(1, 20, 30))
    (source,) = sources(find(tmp_path))
    (opened,) = open_videos(source, tmp_path / "scratch")
    assert len(list(opened)) == 1
