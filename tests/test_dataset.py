import dataclasses
import shutil

import numpy as np
import pytest

from fdm_cli import config as configuration
from fdm_cli.clip_cache import ClipCache
from fdm_cli.data_files import find
from fdm_cli.dataset import open_clips, survey
from fdm_cli.errors import BadInput
from fdm_cli.randomness import generator
from tests import clips


def config(source, **data):
    base = configuration.load_preset("moving-mnist")
    return dataclasses.replace(base, data=dataclasses.replace(base.data, source=str(source), **data))


def counting(videos, frames, size=32):
    """Videos whose pixels are 100 v + f in video v, frame f."""
    values = 100 * np.arange(videos)[:, None] + np.arange(frames)
    return np.broadcast_to(values[..., None, None], (videos, frames, size, size)).astype(np.uint8)


def test_clips_are_windows_of_videos(tmp_path):
    np.save(tmp_path / "clips.npy", counting(2, 50))
    source = open_clips(config(tmp_path / "clips.npy"))
    starts = set()
    for number in range(60):
        frames = source.clip(generator(number), np.array([0, 7, 29]))
        assert frames.shape == (3, 32, 32, 1)
        values = frames[:, 0, 0, 0].astype(int)
        assert (values - values[0]).tolist() == [0, 7, 29]
        starts.add(values[0])
    assert starts <= set(range(21))
    assert len(starts) > 15
    held_out = open_clips(config(tmp_path / "clips.npy"), "held-out")
    assert 100 <= held_out.clip(generator(1), np.array([0]))[0, 0, 0, 0] <= 120


def test_an_array_that_fits_is_mapped_where_it_lies(tmp_path):
    np.save(tmp_path / "fits.npy", counting(4, 40))
    np.save(tmp_path / "larger.npy", counting(4, 40, size=34))
    for name, copied in (("fits.npy", 0), ("larger.npy", 4 * 40 * 32 * 32)):
        cache = ClipCache(find(tmp_path / name), 32, 1)
        open_clips(config(tmp_path / name))
        assert (cache.folder / "frames.bin").stat().st_size == copied
        assert np.array_equal(cache.frames[..., 0], counting(4, 40).reshape(160, 32, 32))


def test_a_video_is_drawn_as_often_as_it_has_frames(tmp_path):
    np.save(tmp_path / "1.npy", counting(1, 30)[0] // 30)  # zeros
    np.save(tmp_path / "2.npy", counting(1, 90)[0] // 90 + 1)  # ones
    np.save(tmp_path / "3.npy", counting(1, 30)[0])  # held out
    source = open_clips(config(tmp_path))
    drawn = [source.clip(generator(number), np.array([0]))[0, 0, 0, 0] for number in range(800)]
    assert set(drawn) == {0, 1}
    assert abs(np.mean(drawn) - 0.75) < 0.05


def test_the_last_tenth_of_the_long_enough_ones_is_held_out(tmp_path):
    for number in range(25):
        np.save(tmp_path / f"{number}.npy", np.full((29 if number == 24 else 30, 32, 32), number, np.uint8))
    seen = {}
    for split in ("train", "held-out"):
        source = open_clips(config(tmp_path), split)
        seen[split] = {int(source.clip(generator(number), np.array([0]))[0, 0, 0, 0]) for number in range(400)}
    assert seen == {"train": set(range(22)), "held-out": {22, 23}}
    found = survey(config(tmp_path))
    assert (found.training, found.held_out, found.frames) == (22, 2, 24 * 30)
    assert [entry.name for entry in found.short] == ["24.npy"]


def test_a_single_video_is_both(tmp_path):
    clips.write_pictures(tmp_path / "clip.gif", clips.moving_square(40, 32, 32))
    found = survey(config(tmp_path / "clip.gif"))
    assert (found.training, found.held_out) == (1, 1)
    train, held_out = (open_clips(config(tmp_path / "clip.gif"), split) for split in ("train", "held-out"))
    assert np.array_equal(train.clip(generator(1), np.arange(9)), held_out.clip(generator(1), np.arange(9)))


def test_training_and_held_out_digits_are_apart():
    train, held_out = (open_clips(config("moving-mnist"), split) for split in ("train", "held-out"))
    assert len(train.digits) == 9000
    assert len(held_out.digits) == 1000
    known = {digit.tobytes() for digit in train.digits}
    assert not any(digit.tobytes() in known for digit in held_out.digits)
    assert (survey(config("moving-mnist")).training, survey(config("moving-mnist")).held_out) == (9000, 1000)


@pytest.mark.slow
def test_a_good_folder_with_others_in_it(tmp_path):
    clips.twenty_good_clips(tmp_path / "clips", frames=30)
    shutil.copytree(tmp_path / "clips", tmp_path / "all")
    good = survey(config(tmp_path / "clips"))
    assert (good.training, good.held_out, good.skipped, good.short) == (18, 2, (), ())
    assert good.frames == sum(30 + number % 3 for number in range(20))
    assert good.kinds() == {"GIF": 6, "MP4": 4, "Matroska": 2, "WebP": 2, "PNG": 2, "folder": 2, "NPY": 1, "NPZ": 1}
    clips.others(tmp_path / "all", large=(200, 300))
    found = survey(config(tmp_path / "all", clip_length=24))
    assert (found.training, found.held_out, found.ignored) == (20, 2, 1)
    assert found.sizes()["300x200"] == 1
    assert [entry.name for entry in found.short] == ["one.gif"]
    assert [entry.message for entry in found.skipped] == [
        "empty.gif: empty file",
        "text.mp4: not a MP4 file",
        "truncated.mp4: truncated",
    ]
    with pytest.raises(BadInput, match="empty file"):
        survey(config(tmp_path / "all", strict=True))


@pytest.mark.slow
def test_the_fingerprint_is_that_of_the_content(tmp_path):
    clips.twenty_good_clips(tmp_path / "a", frames=30)
    first = survey(config(tmp_path / "a")).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "moved" / "b", copy_function=shutil.copyfile)  # other times
    (tmp_path / "moved" / "b" / "broken.gif").touch()
    assert survey(config(tmp_path / "moved" / "b")).fingerprint == first
    clips.write_pictures(tmp_path / "moved" / "b" / "clip-3.gif", clips.moving_square(30, 40, 40, 99))
    assert survey(config(tmp_path / "moved" / "b")).fingerprint != first


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.npy", None, "no such file"),
        ("text.npy", b"hello", "cannot be read"),
        ("empty.npz", b"", "cannot be read"),
        ("digits.bin", b"hello", "unsupported kind of file '.bin'"),
        ("text.mp4", b"hello", "not a MP4 file"),
    ],
)
def test_a_source_that_is_no_data(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for _ in range(2):  # not yet in the cache, and then
        with pytest.raises(BadInput, match=says):
            open_clips(config(path))


def test_folders_with_nothing_to_train_on(tmp_path):
    with pytest.raises(BadInput, match="no videos there") as caught:
        open_clips(config(tmp_path))
    assert ".webm" in caught.value.hint
    (tmp_path / "broken.gif").write_bytes(b"GIF")
    with pytest.raises(BadInput, match=r"no videos there: 1 unreadable \(the first: broken.gif: not a GIF file\)"):
        open_clips(config(tmp_path))
    np.save(tmp_path / "short.npy", counting(4, 10))
    says = r"no clip has the 30 frames of data\.clip_length: 4 shorter, the longest 10; 1 unreadable"
    with pytest.raises(BadInput, match=says) as caught:
        open_clips(config(tmp_path))
    assert caught.value.hint == "--set data.clip_length=10"


def test_what_the_source_is_called_is_no_part_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("FDM_CACHE", str(tmp_path / "cache"))
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(4):
        clips.write_pictures(frames / f"{number}.png", clips.moving_square(1, 8, 8))
    before = survey(config(frames, clip_length=4)).fingerprint
    frames.rename(tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    assert survey(config(".", clip_length=4)).fingerprint == before


@pytest.mark.parametrize("source", ["~nosuchuser/x", ""])
def test_a_source_that_is_nowhere(source):
    with pytest.raises(BadInput, match=r"empty|home"):
        open_clips(config(source))
