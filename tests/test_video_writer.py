import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from fdm_cli import video
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.video_writer import check_output, open_writer, real_fps
from tests.clips import everything, over_gradient, write

SEED = np.random.default_rng(7)
LOSSLESS = ["a.npz", "a.apng", "a.webp", "frames/"]
EVERY = [*LOSSLESS, "a.gif", "a.mp4"]


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


# Round trips, counted by readers of others.


def frames_by_another_reader(path):
    """How many frames Pillow, PyAV or numpy see, and for how long, in seconds (None: it does not say)."""
    if path.is_dir():
        return len(list(path.iterdir())), None
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return len(archive["frames"]), len(archive["frames"]) / float(archive["fps"])
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return len(list(container.decode(video=0))), float(stream.duration * stream.time_base)
    with Image.open(path) as image:
        seconds = 0.0
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            seconds += image.info["duration"] / 1000
        return image.n_frames, seconds


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", EVERY)
def test_written_files_hold_every_frame(tmp_path, name, channels):
    frames = np.repeat(over_gradient(channels=channels), [1, 5] * 6, axis=0)  # many equal ones in a row
    path = tmp_path / name
    writer = write(f"{tmp_path}/{name}", frames)
    count, seconds = frames_by_another_reader(path)
    assert count == len(frames) == writer.frames
    assert seconds is None or seconds == pytest.approx(len(frames) / writer.fps, rel=1e-3)
    info = video.probe(path)
    assert (info.frames, info.height, info.width, info.fps) == (len(frames), 20, 24, pytest.approx(10))
    assert listing(tmp_path) == [name.rstrip("/")]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_are_exact(tmp_path, name, channels):
    frames = SEED.integers(0, 256, (5, 9, 7, channels), np.uint8)
    write(f"{tmp_path}/{name}", frames)
    back = everything(tmp_path / name)
    assert back.shape[3] == (3 if name == "a.webp" else channels)
    assert np.array_equal(back[..., :channels], frames)


def test_grey_gif_is_exact_and_stays_grey(tmp_path):
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 0)
    frames[1:] = SEED.integers(0, 256, (2, 16, 16, 1))
    write(tmp_path / "a.gif", frames)
    assert np.array_equal(everything(tmp_path / "a.gif"), frames)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0
        image.seek(2)
        assert np.array_equal(np.asarray(image.convert("L")), frames[2, ..., 0])


def test_gif_reads_the_same_in_libav(tmp_path):
    frames = over_gradient(channels=3)
    write(tmp_path / "a.gif", frames)
    with av.open(str(tmp_path / "a.gif")) as container:
        seen = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.array_equal(seen, everything(tmp_path / "a.gif"))


def test_colour_gif_of_few_colours_is_exact(tmp_path):
    frames = over_gradient(channels=3)
    write(tmp_path / "a.gif", frames)
    assert np.array_equal(everything(tmp_path / "a.gif"), frames)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (33, 51)])
def test_mp4_is_close_and_plays_everywhere(tmp_path, height, width, channels):
    frames = over_gradient(6, height, width, channels=channels)
    if channels == 3:
        frames = frames[..., :1].repeat(3, -1)  # 4:2:0 keeps the luma, not sharp edges of colour
    writer = write(tmp_path / "a.mp4", frames)
    even = (height + height % 2, width + width % 2)
    assert bool(writer.remarks) == (even != (height, width))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    back = everything(tmp_path / "a.mp4")
    assert back.shape == (6, *even, 3)
    difference = np.abs(back[:, :height, :width, :1].astype(int) - frames[..., :1])
    assert difference.mean() < 2


@pytest.mark.parametrize(
    ("name", "fps", "real"),
    [
        ("a.gif", 25, 25),
        ("a.gif", 30, 100 / 3),
        ("a.gif", 1000, 50),
        ("a.gif", 0.01, 0.01),
        ("a.webp", 30, 1000 / 33),
        ("a.webp", 60, 1000 / 17),
        ("a.webp", 1000, 1000 / 11),
        ("a.apng", 30000 / 1001, 30000 / 1001),
        ("a.apng", 0.01, 0.01),
        ("a.apng", 60, 60),
        ("a.apng", 1000, 90),
        ("a.mp4", 30000 / 1001, 30000 / 1001),
        ("a.npz", 12.5, 12.5),
    ],
)
def test_the_rate_is_what_the_writer_says(tmp_path, name, fps, real):
    assert real_fps(Path(name), fps) == pytest.approx(real)
    assert write(tmp_path / name, over_gradient(3), fps).fps == pytest.approx(real)
    assert video.probe(tmp_path / name).fps == pytest.approx(real, rel=1e-4)


@pytest.mark.parametrize("fps", [0, -1, 1e9, float("nan"), float("inf")])
def test_absurd_rates_are_refused(fps):
    with pytest.raises(BadInput, match="frames per second"):
        real_fps(Path("a.gif"), fps)


# Outputs that cannot be, and writing that fails.


@pytest.mark.parametrize(
    ("output", "says", "hint"),
    [
        ("there.gif", "exists already", "--force"),
        ("folder.gif", "is a folder", None),
        ("none/a.gif", "no folder", None),
        ("a.gfi", "cannot write .gfi", "known: .gif"),
        ("a.txt", "cannot write .txt", ".mp4"),
        ("there", "is a file, not a folder", None),
        ("full", "holds other files", None),
        ("frames", "exists already", "--force"),
        ("/", "cannot be replaced", None),
    ],
)
def test_outputs_are_checked_before_any_work(tmp_path, monkeypatch, output, says, hint):
    monkeypatch.chdir(tmp_path)
    for name in ("there", "there.gif"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "frame-000000.png").write_text("precious")
    for attempt in (check_output, lambda path: open_writer(path, 10)):
        with pytest.raises(BadInput, match=says) as caught:
            attempt(Path(output))
        assert hint is None or hint in (caught.value.hint or "")


def test_force_replaces(tmp_path):
    for name in ("a.gif", "frames/"):
        write(f"{tmp_path}/{name}", over_gradient(9))
        write(f"{tmp_path}/{name}", over_gradient(3), force=True)
        assert video.probe(tmp_path / name).frames == 3
    assert listing(tmp_path) == ["a.gif", "frames"]
    (tmp_path / "frames" / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match="holds other files"):
        open_writer(tmp_path / "frames", 10, force=True)


def test_unwritable_folder():
    code = (
        "import os, sys; from fdm_cli.video_writer import check_output;"
        "os.geteuid() or os.setuid(65534);"  # root may write anywhere
        "from pathlib import Path; check_output(Path(sys.argv[1]))"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        command = [sys.executable, "-c", code, f"{folder}/a.gif"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"the folder {folder} is not writable" in done.stderr


def test_too_many_frames_for_a_picture_are_refused_at_once(tmp_path):
    with pytest.raises(BadInput, match="at most 150000"):
        open_writer(tmp_path / "a.gif", 10, frames=150_001)
    open_writer(tmp_path / "a.mp4", 10, frames=150_001)


@pytest.mark.parametrize("name", EVERY)
def test_an_interrupted_video_leaves_nothing(tmp_path, name):
    (tmp_path / "a.txt").write_text("other")

    def interrupted():
        yield over_gradient(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(f"{tmp_path}/{name}", interrupted())
    with pytest.raises(RunFailed, match="no frames"):
        write(f"{tmp_path}/{name}", [])
    assert listing(tmp_path) == ["a.txt"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    def meanwhile():
        yield over_gradient(1)[0]
        (tmp_path / "a.gif").write_text("precious")

    with pytest.raises(BadInput, match="exists already"):
        write(tmp_path / "a.gif", meanwhile())
    assert (tmp_path / "a.gif").read_text() == "precious"


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from fdm_cli.errors import RunFailed
from fdm_cli.video_writer import open_writer
noise = np.random.default_rng(0)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    with open_writer(Path(sys.argv[1]), 10) as writer:
        for _ in range(60):
            writer.write(noise.integers(0, 256, (64, 64, 3), np.uint8))
except RunFailed as error:
    print(error.message)
"""


@pytest.mark.parametrize(
    ("name", "limit"),
    [*((name, 50_000) for name in EVERY[:3]), ("frames/", 5_000), ("a.gif", 50_000), ("a.mp4", 50_000)],
)
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, name, limit):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, f"{tmp_path}/{name}", str(limit)], capture_output=True, text=True, check=True
    )
    assert "no space left to write" in done.stdout
    assert name.rstrip("/") in done.stdout
    assert listing(tmp_path) == []


PEAK = """
import pathlib, re, sys
import numpy as np
from fdm_cli.video import read
from fdm_cli.video_writer import open_writer
def print_peak():
    print(int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) // 1024)
path, frames = pathlib.Path(sys.argv[1]), int(sys.argv[2])
noise = np.random.default_rng(0).integers(0, 256, (64, 96, 1), np.uint8)
with open_writer(path, 25, frames=frames) as writer:
    for index in range(frames):
        writer.write(np.roll(noise, index, 1))
print_peak()
assert sum(1 for _ in read(path)) == frames
print_peak()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read from Linux's /proc")
@pytest.mark.parametrize("name", EVERY)
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path, name):
    peaks = []
    for frames in (160, 5_000):
        command = [sys.executable, "-c", PEAK, f"{tmp_path}/{frames}{name}", str(frames)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append([int(line) for line in done.stdout.split()])
    print(name, "MB after writing and after reading, 160 and 5,000 frames:", peaks)
    compressed = (tmp_path / f"5000{name}").stat().st_size >> 20
    held = 2 * compressed if name == "a.webp" else 0  # Pillow's reader of WebP holds the compressed file
    assert np.subtract(peaks[1], peaks[0]).max() <= 15 + held  # the frames are 31 MB
