import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3
import numpy as np
import pytest

from fdm_cli import video
from fdm_cli.clip_cache import ClipCache, cache_folder
from fdm_cli.data_files import find
from fdm_cli.errors import BadInput, RunFailed
from tests import clips
from tests.conftest import ROOT

FILL = """
import re, sys
from pathlib import Path
from fdm_cli.clip_cache import ClipCache
from fdm_cli.data_files import find
for step in ClipCache(find(Path(sys.argv[1])), int(sys.argv[2]), 3).fill():
    print(step.frames, "waiting" if step.waiting else "decoding", flush=True)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("FDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Three clips of three kinds, and a broken file between them."""
    made = tmp_path / "data"
    made.mkdir()
    clips.write_pictures(made / "1.gif", clips.moving_square(20, 40, 30))
    (made / "2.mp4").write_bytes(b"this is text")
    clips.write_container(made / "3.mp4", clips.moving_square(150, 40, 60, 1))
    np.save(made / "4.npy", clips.moving_square(9, 16, 16, 2)[..., 0])
    return made


def filled(path, size=16, channels=3, **options) -> ClipCache:
    cache = ClipCache(find(path), size, channels)
    for _ in cache.fill(**options):
        pass
    return cache


def start(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", FILL, *map(str, arguments)]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_cache_holds_what_fit_makes_of_every_frame(folder):
    cache = filled(folder)
    assert [(entry.name, entry.start, entry.frames) for entry in cache.videos] == [
        ("1.gif", 0, 20),
        ("3.mp4", 20, 150),
        ("4.npy", 170, 9),
    ]
    assert [entry.message for entry in cache.skipped] == ["2.mp4: not a MP4 file"]
    for entry in cache.videos:
        expected = np.stack([video.fit(frame, 16, 3) for frame in video.read(folder / entry.name)])
        assert np.array_equal(cache.frames[entry.start : entry.start + entry.frames], expected)
    first = cache.videos[0]
    assert (first.kind, first.height, first.width, first.channels, first.fps) == ("GIF", 40, 30, 3, 12.5)
    assert isinstance(cache.frames, np.memmap)


def test_left_out_files_have_their_own_names(tmp_path):
    inner = tmp_path / "clips" / "old_clips"
    inner.mkdir(parents=True)
    (inner / "broken.gif").write_bytes(b"no picture")
    clips.write_pictures(tmp_path / "clips" / "1.png", clips.moving_square(20, 30, 30))
    assert [entry.message.split(":")[0] for entry in filled(tmp_path / "clips").skipped] == ["old_clips/broken.gif"]


def test_it_is_decoded_once(folder):
    cache = filled(folder)
    before = (cache.folder / "frames.bin").stat()
    assert list(ClipCache(find(folder), 16, 3).fill()) == []
    assert (cache.folder / "frames.bin").stat() == before


@pytest.mark.slow
def test_another_size_or_a_changed_file_is_another_cache(folder):
    keys = {filled(folder).folder, filled(folder, size=8).folder, filled(folder, channels=1).folder}
    os.utime(folder / "1.gif", (1, 1))
    keys.add(filled(folder).folder)
    (folder / "5.gif").touch()
    keys.add(filled(folder).folder)
    assert len(keys) == 5


def test_strict_stops_at_the_first_broken_file_and_leaves_nothing(folder, cache_dir):
    with pytest.raises(BadInput, match=r"2\.mp4: not a MP4 file"):
        filled(folder, strict=True)
    assert not [entry for entry in cache_dir.iterdir() if entry.suffix != ".lock"]


def test_a_video_that_breaks_in_the_middle_leaves_no_frames(folder):
    clips.write_pictures(folder / "2.png", clips.moving_square(20, 30, 30))
    data = bytearray((folder / "2.png").read_bytes())
    last = data.rfind(b"fdAT") + 8
    data[last : last + 20] = bytes(20)
    (folder / "2.png").write_bytes(data)
    cache = filled(folder)
    assert [entry.message.split(":")[0] for entry in cache.skipped] == ["2.mp4", "2.png"]
    assert "breaks at frame" in cache.skipped[1].message
    assert [entry.start for entry in cache.videos] == [0, 20, 170]
    assert (cache.folder / "frames.bin").stat().st_size == 179 * 16 * 16 * 3


@pytest.mark.parametrize("damage", ["shorter", "no index", "half an index"])
def test_a_damaged_cache_is_made_anew(folder, damage):
    cache = filled(folder)
    frames, index = cache.folder / "frames.bin", cache.folder / "videos.json"
    good = frames.read_bytes(), json.loads(index.read_text())
    if damage == "shorter":
        frames.write_bytes(good[0][:-1])
    elif damage == "no index":
        index.unlink()
    else:
        index.write_text(index.read_text()[:50])
    filled(folder)
    assert (frames.read_bytes(), json.loads(index.read_text())) == good


def test_a_passing_error_leaves_no_file_out_for_good(folder, cache_dir, monkeypatch):
    real_open = Path.open

    def failing(path, *arguments, **options):
        if path.name == "3.mp4":
            raise OSError(errno.EIO, "Input/output error")
        return real_open(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        with pytest.raises(RunFailed, match=r"cannot read .*3\.mp4: Input/output error"):
            filled(folder)
    assert not list(cache_dir.rglob("videos.json"))
    assert [entry.name for entry in filled(folder).videos] == ["1.gif", "3.mp4", "4.npy"]


def test_so_does_one_that_comes_while_a_file_is_decoded(folder, cache_dir, monkeypatch):
    def failing(*_, **__):
        raise OSError(errno.EIO, "Input/output error")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(imageio.v3, "imiter", failing)
        with pytest.raises(RunFailed, match=r"cannot read .*1\.gif: Input/output error"):
            filled(folder)
    assert not list(cache_dir.rglob("videos.json"))
    assert [entry.name for entry in filled(folder).videos] == ["1.gif", "3.mp4", "4.npy"]


@pytest.mark.slow
def test_two_processes_at_once_decode_once(folder):
    first = start(folder, 512)
    first.stdout.readline()
    first.send_signal(signal.SIGSTOP)  # while it holds the lock
    second = start(folder, 512)
    assert second.stdout.readline() == "0 waiting\n"
    first.send_signal(signal.SIGCONT)
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert "decoding" in outputs[0][0]
    assert "decoding" not in outputs[1][0]
    assert len(filled(folder, 512).videos) == 3


@pytest.mark.slow
def test_killed_at_any_moment_it_never_leaves_half_a_cache(folder, cache_dir):
    expected = filled(folder, 256).frames.tobytes()
    began = time.monotonic()
    shutil.rmtree(cache_dir)
    start(folder, 256).communicate(timeout=120)
    whole = time.monotonic() - began
    shutil.rmtree(cache_dir)
    partial = 0
    for moment in np.linspace(0.3, 1.0, 12):
        process = start(folder, 256)
        time.sleep(moment * whole)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        partial += any(entry.suffix == ".part" for entry in cache_dir.glob("*"))
    assert partial
    assert filled(folder, 256).frames.tobytes() == expected
    assert sorted(entry.suffix for entry in cache_dir.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("place", ["frames", "unpacking"])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, cache_dir, place):
    (tmp_path / "data").mkdir()
    frames = clips.moving_square(200, 64, 64)
    if place == "frames":
        clips.write_pictures(tmp_path / "data" / "clip.gif", frames)
    else:
        np.savez_compressed(tmp_path / "data" / "clip.npz", frames=frames)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(RunFailed, match="no space left to write") as caught:
            filled(tmp_path / "data", 64 if place == "frames" else 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 1
    assert not [entry for entry in cache_dir.iterdir() if entry.suffix != ".lock"]


def test_a_cache_folder_that_cannot_be_made(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FDM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunFailed, match=r"cannot write .*file/cache"):
        filled(folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_decoding_takes_no_more_memory_for_a_longer_video(tmp_path):
    """300 frames of 640 x 480 are 276 MB once decoded."""
    peaks = []
    for frames in (10, 300):
        (tmp_path / str(frames)).mkdir()
        clips.write_container(tmp_path / str(frames) / "clip.mp4", clips.moving_square(frames, 480, 640))
        process = start(tmp_path / str(frames), 16)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        peaks.append(int(stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 20_000  # KB


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("FDM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FDM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fdm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fdm"


def test_a_path_that_is_no_text(tmp_path):
    folder = tmp_path / "n\udcfe"
    folder.mkdir()
    clips.write_pictures(folder / "1.gif", clips.moving_square(20, 40, 30))
    assert len(filled(folder, 16).videos) == 1
