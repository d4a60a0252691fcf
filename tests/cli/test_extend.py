import json

import numpy as np
import pytest
from PIL import Image

from fdm_cli.config import MovingMnistConfig
from fdm_cli.moving_mnist import MovingMnist, built_in_digits
from fdm_cli.randomness import generator
from tests.conftest import fdm

pytestmark = pytest.mark.slow

FAST = ("--sampling-steps", 2, "--seed", 5)


@pytest.fixture
def clip(tmp_path):
    """Twelve frames of a moving digit as a GIF, and the frames."""
    source = MovingMnist(built_in_digits(), MovingMnistConfig(digits=1), 16, 1, 12)
    frames = source.clip(generator(1), np.arange(12))
    images = [Image.fromarray(frame[..., 0]) for frame in frames]
    images[0].save(tmp_path / "clip.gif", save_all=True, append_images=images[1:], duration=80, loop=0)
    return frames


def test_the_clip_s_own_frames_come_first_and_untouched(micro_checkpoint, clip, tmp_path):
    done = fdm(
        "extend", "clip.gif", "--length", 64, "--checkpoint", micro_checkpoint, *FAST, "-o", "out.npz", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["frames"] == 64
    assert result["given"] == [[0, 12]]
    assert result["fps"] == 12.5
    with np.load(tmp_path / "out.npz") as arrays:
        frames = arrays["frames"]
    assert frames.shape == (64, 16, 16, 1)
    assert np.array_equal(frames[:12], clip)
    assert frames[12:].std() > 5


def test_what_is_generated_depends_on_the_clip(micro_checkpoint, clip, tmp_path):
    np.savez(tmp_path / "other.npz", frames=255 - clip, fps=10.0)
    made = []
    for name in ("clip.gif", "other.npz"):
        fdm("extend", name, "--length", 20, "--checkpoint", micro_checkpoint, *FAST, "-o", f"{name}.npz", cwd=tmp_path)
        with np.load(tmp_path / f"{name}.npz") as arrays:
            made.append(arrays["frames"][12:].astype(int))
    assert np.abs(made[0] - made[1]).mean() > 0.5


@pytest.mark.usefixtures("clip")
def test_a_chosen_name(micro_checkpoint, tmp_path):
    done = fdm("extend", "clip.gif", "--length", 16, "--checkpoint", micro_checkpoint, *FAST, cwd=tmp_path)
    assert done.stdout.strip() == "clip-extended-1.gif"
    assert "16x16" in done.stderr


def test_clips_before_and_between(micro_checkpoint, clip, tmp_path):
    """The direction is a matter of the scheme."""
    for scheme, places in {"prepend": range(12, 24), "interpolate": [i * 23 // 11 for i in range(12)]}.items():
        fdm(
            "extend", "clip.gif", "--scheme", scheme, "--length", 24, "--checkpoint", micro_checkpoint, *FAST,
            "-o", f"{scheme}.npz", cwd=tmp_path,
        )  # fmt: skip
        with np.load(tmp_path / f"{scheme}.npz") as arrays:
            assert np.array_equal(arrays["frames"][list(places)], clip)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.gif", None, "no such file: missing.gif"),
        ("text.gif", b"hello, I am a text", "text.gif"),
        ("empty.gif", b"", "empty.gif"),
        ("clip.xyz", b"hello", "clip.xyz"),
    ],
)
def test_a_clip_that_is_none(micro_checkpoint, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    done = fdm("extend", name, "--checkpoint", micro_checkpoint, cwd=tmp_path, check=2)
    assert done.stderr.startswith("error: ")
    assert says in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("clip")
def test_a_clip_as_long_as_the_result(micro_checkpoint, tmp_path):
    done = fdm("extend", "clip.gif", "--length", 12, "--checkpoint", micro_checkpoint, cwd=tmp_path, check=2)
    assert "the clip has 12 frames" in done.stderr
    assert "--length 13" in done.stderr
