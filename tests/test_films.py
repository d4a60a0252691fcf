import resource

import numpy as np
import pytest

from fdm_cli import montage, video
from fdm_cli.errors import BadInput
from fdm_cli.films import Films

NOISE = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 7, 1), np.uint8)  # N, S, H, W, C


def everything(path):
    return np.stack(list(video.read(path)))


def test_a_file_each(tmp_path):
    paths = [tmp_path / f"a-{number}.npz" for number in range(3)]
    with Films(paths, 12, shape=(5, 6, 7), samples=3) as films:
        for frame in NOISE:
            films.write(frame)
    for number, path in enumerate(paths):
        assert np.array_equal(everything(path), NOISE[:, number])
    assert (films.fps, films.size) == (12, (6, 7))
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("scale", [1, 3])
def test_all_in_one_grid_enlarged_with_a_sheet(tmp_path, scale):
    path, sheet = tmp_path / "a.gif", tmp_path / "a.png"
    with Films([path], 30, shape=(5, 6, 7), samples=3, grid=True, scale=scale, sheets=[sheet]) as films:
        for frame in NOISE:
            films.write(frame)
    frames = everything(path)
    assert films.size == frames.shape[1:3] == (6 * scale, 23 * scale)
    assert films.fps == pytest.approx(100 / 3)
    expected = np.stack([montage.grid(frame) for frame in NOISE])
    assert np.array_equal(frames, expected.repeat(scale, 1).repeat(scale, 2))
    assert video.probe(sheet).width > 5 * 23


def test_sheets_of_many_samples_show_fewer_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("fdm_cli.films._SHEETS_BYTES", 3 * 3 * 6 * 7 * 2)
    paths, sheets = ([tmp_path / f"a-{number}.{suffix}" for number in range(3)] for suffix in ("npz", "png"))
    with Films(paths, 12, shape=(5, 6, 7), samples=3, sheets=sheets) as films:
        for frame in NOISE:
            films.write(frame)
    whole, few = tmp_path / "whole.png", sheets[0]
    with Films([tmp_path / "whole.npz"], 12, shape=(5, 6, 7), sheets=[whole]) as films:
        for frame in NOISE[:, :1]:
            films.write(frame)
    assert video.probe(few).width < video.probe(whole).width
    assert len(everything(paths[0])) == 5


def test_an_mp4_of_odd_size_says_its_real_one(tmp_path):
    with Films([tmp_path / "a.mp4"], 10, shape=(5, 6, 7)) as films:
        films.write(NOISE[0, :1])
    info = video.probe(tmp_path / "a.mp4")
    assert films.size == (info.height, info.width) == (6, 8)
    assert films.remarks == ("7x6 padded to 8x6: MP4 needs even sizes",)


def test_nothing_is_left_of_what_fails(tmp_path):
    paths = [tmp_path / "a-1.gif", tmp_path / "a-2.gif"]

    def interrupted():
        with Films(paths, 10, shape=(5, 6, 7), samples=2) as films:
            films.write(NOISE[0, :2])
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_more_videos_than_files_may_be_open(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
        with Films([tmp_path / f"{n}.npz" for n in range(40)], 10, shape=(1, 6, 7), samples=40) as films:
            films.write(np.repeat(NOISE[:1, 0], 40, axis=0))
        assert len(list(tmp_path.iterdir())) == 40
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with pytest.raises(BadInput, match="open files, the system allows"):
            Films([tmp_path / "a.gif"] * most, 10, shape=(1, 6, 7), samples=most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("name", "frames", "scale", "says"),
    [
        ("a.mp4", 2, 3000, "frames of 21000x18000 are too large for .mp4"),
        ("a.npz", 2, 1000, "frames of 7000x6000 are too large for .npz"),
        ("a.gif", 10_000, 200, "10000 frames of 1400x1200; such files hold at most 1e[+]10 pixels"),
        ("a.gif", 200_000, 1, "at most 150000"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_any_work(tmp_path, name, frames, scale, says):
    with pytest.raises(BadInput, match=says):
        Films([tmp_path / name], 10, shape=(frames, 6, 7), scale=scale)
