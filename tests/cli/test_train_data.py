"""`fdm train --data` on folders as people have them, through the real command."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from fdm_cli.checkpoint import read_state
from tests import clips
from tests.command import Command
from tests.conftest import fdm

pytestmark = pytest.mark.slow

TINY = ("train", "--preset", "micro", "--set", "model.image_channels=3", "--batch-size", 2)


@pytest.fixture(scope="module")
def my_videos(tmp_path_factory):
    """Twenty good clips, and what lies among them."""
    folder = tmp_path_factory.mktemp("data") / "my_videos"
    clips.twenty_good_clips(folder)
    clips.others(folder)
    return folder


def test_trains_on_the_good_ones_and_names_the_others(my_videos, tmp_path):
    done = fdm(*TINY, "--data", my_videos, "--steps", 3, "--run", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000003.pt").exists()
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: left out empty.gif: empty file",
        "warning: left out text.mp4: not a MP4 file",
        "warning: left out truncated.mp4: truncated",
    ]
    assert "left out 1 shorter than data.clip_length 20: one.gif (1)" in done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)


def test_pixels_that_the_configuration_is_not_made_for_are_named(tmp_path):
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (3, 20, 16, 16), np.uint8))
    done = fdm("train", "--preset", "micro", "--data", "noise.npy", "--set", "diffusion.data_mean=-0.9",
               "--set", "diffusion.data_std=0.37", "--dry-run", cwd=tmp_path)  # fmt: skip
    assert "have mean 0.00 and deviation 0.58, the configuration is for -0.9 and 0.37" in done.stderr
    assert "--set diffusion.data_mean=0.00 --set diffusion.data_std=0.58" in done.stderr


def test_dry_run_says_what_was_found_and_draws_it(my_videos, tmp_path):
    done = fdm(*TINY, "--data", my_videos, "--dry-run", "--json", cwd=tmp_path)
    data = json.loads(done.stdout)["data"]
    # 20 clips of 24 to 26 frames, the transparent one and the large one.
    assert (data["training"], data["held_out"], data["frames"]) == (20, 2, sum(24 + n % 3 for n in range(20)) + 48)
    assert sum(data["sizes"].values()) == sum(data["fps"].values()) == sum(data["kinds"].values()) == 22
    assert data["sizes"]["3000x2000"] == 1
    assert data["fps"]["30"] == 1
    assert data["short"] == [{"name": "one.gif", "frames": 1}]
    assert [line.split(":")[0] for line in data["skipped"]] == ["empty.gif", "text.mp4", "truncated.mp4"]
    assert data["ignored"] == 1
    assert data["sheet"] == "my_videos.clips.png"
    assert [entry.name for entry in tmp_path.iterdir()] == ["my_videos.clips.png"]
    with Image.open(tmp_path / "my_videos.clips.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(1 << 24)}
        assert sheet.width == 16 * (64 + 8)
    assert colours >= {(0, 114, 178), (213, 94, 0)}  # frames marked as observed, as latent
    text = fdm(*TINY, "--data", my_videos, "--dry-run", cwd=tmp_path).stdout
    for line in (
        "# left out truncated.mp4: truncated",
        "# left out 1 shorter than data.clip_length 20: one.gif (1)",
        "# my_videos-2.clips.png: ",
    ):
        assert line in text
    (tmp_path / "again.yaml").write_text(text)
    assert json.loads(fdm("train", "--config", "again.yaml", "--dry-run", "--json", cwd=tmp_path).stdout)["data"]


def test_strict_stops_at_the_first_one(my_videos, tmp_path):
    for _ in range(2):
        done = fdm(*TINY, "--data", my_videos, "--strict", "--run", tmp_path / "run", check=2)
        assert done.stderr.splitlines()[-2].startswith("error: ")
        assert "empty.gif: empty file" in done.stderr
    assert not (tmp_path / "run").exists()


def test_nothing_left(my_videos, tmp_path):
    done = fdm(*TINY, "--data", my_videos, "--set", "data.clip_length=27", "--run", tmp_path / "run", check=2)
    assert "no clip has the 27 frames of data.clip_length: 23 shorter, the longest 26; 3 unreadable" in done.stderr
    assert "hint: --set data.clip_length=26" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_resuming_is_exact_and_wants_the_same_data(tmp_path):
    clips.twenty_good_clips(tmp_path / "data")
    command = (*TINY, "--data", "data", "--set", "training.checkpoint_every=2", "--set", "data.masks=filled")
    fdm(*command, "--steps", 5, "--run", "straight", cwd=tmp_path)
    fdm(*command, "--steps", 2, "--run", "run", cwd=tmp_path)
    # The same files elsewhere on the disk, of another time and decoded anew, are the same data.
    (tmp_path / "data").rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "data", copy_function=shutil.copyfile)
    fdm("train", "--run", "run", "--resume", "--steps", 4, "--data", "before", cwd=tmp_path)
    # What is written in the checkpoint is enough, and so is a folder that has moved.
    (tmp_path / "run" / "config.yaml").unlink()
    fdm("train", "--run", "run", "--resume", "--steps", 5, "--data", "data", cwd=tmp_path)
    mine, other = (read_state(tmp_path / run / "checkpoints" / "step-00000005.pt") for run in ("run", "straight"))
    assert all(np.array_equal(mine["model"][key], other["model"][key]) for key in mine["model"])
    clips.write_pictures(tmp_path / "data" / "one-more.gif", clips.moving_square(30, 40, 40))
    done = fdm("train", "--run", "run", "--resume", "--steps", 6, cwd=tmp_path, check=2)
    assert (
        "the data has changed since the run began: 20 clips, 499 frames then, 21 clips, 529 frames now" in done.stderr
    )
    assert "--init-from run/checkpoints/step-00000005.pt" in done.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_while_decoding_stops_at_once_and_leaves_nothing(tmp_path, name, code):
    (tmp_path / "data").mkdir()
    clips.write_container(tmp_path / "data" / "long.mp4", clips.moving_square(2000, 240, 320))
    process = Command(*TINY, "--data", "data", "--run", "run", cwd=tmp_path, FDM_CACHE=str(tmp_path / "cache"))
    while not list((tmp_path / "cache").glob("*.part")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists()


def test_a_full_disk(my_videos, tmp_path):
    """The cache is about 420 KB; the limit on the size of a file stands for a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        cache = str(tmp_path / "cache")
        done = fdm(*TINY, "--data", my_videos, "--run", tmp_path / "run", check=1, anew=True, FDM_CACHE=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line for line in done.stderr.splitlines() if "no space left to write" in line]
    assert "Traceback" not in done.stderr
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists()
