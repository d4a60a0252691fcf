"""Memory does not grow with a video's length."""

import pytest

from tests.bench import sampled
from tests.conftest import fdm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large_frames(tmp_path_factory):
    """A model whose frames are large (49 KB as bytes) and whose network is small: 128 x 128 pixels in blocks of 16."""
    folder = tmp_path_factory.mktemp("large") / "run"
    shape = ("image_size=128", "patch_size=16", "image_channels=3", "attention_resolutions=[4]")
    sets = ["--set", "data.moving_mnist.canvas=128"]
    sets += [part for value in shape for part in ("--set", f"model.{value}")]
    return fdm("train", "--preset", "micro", *sets, "--steps", 1, "--run", folder, "-q").stdout.strip()


def test_frames_wait_on_disk(large_frames, tmp_path):
    """1,240 frames more are 61 MB, as bytes: held in memory, they would show beside the 8 to 40 of other things."""
    options = ["--checkpoint", large_frames, "--scheme", "keyframes", "--sampling-steps", "1", "--max-batch", "4"]
    short, _ = sampled([*options, "--length", "160"], tmp_path / "video.mp4")
    long, _ = sampled([*options, "--length", "1400"], tmp_path / "video.mp4")
    print(f"{short:.0f} MB, {long:.0f} MB")
    assert long - short < 50
