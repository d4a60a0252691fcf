import json

import numpy as np
import pytest
from PIL import Image

from fdm_cli import video
from fdm_cli.config import MovingMnistConfig
from fdm_cli.diversity import PixelEmbedding, farthest
from fdm_cli.moving_mnist import MovingMnist, built_in_digits
from fdm_cli.randomness import generator
from tests.cli.test_clip import camera_clip
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


def test_the_clip_s_own_frames_come_first_and_untouched(micro_weights, clip, tmp_path):
    done = fdm(
        "extend", "clip.gif", "--length", 64, "--checkpoint", micro_weights, *FAST, "-o", "out.npz", "--json",
        cwd=tmp_path, anew=True,
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


def test_what_is_generated_depends_on_the_clip(micro_weights, clip, tmp_path):
    np.savez(tmp_path / "other.npz", frames=255 - clip, fps=10.0)
    made = []
    for name in ("clip.gif", "other.npz"):
        fdm("extend", name, "--length", 20, "--checkpoint", micro_weights, *FAST, "-o", f"{name}.npz", cwd=tmp_path)
        with np.load(tmp_path / f"{name}.npz") as arrays:
            made.append(arrays["frames"][12:].astype(int))
    assert np.abs(made[0] - made[1]).mean() > 0.5


@pytest.mark.usefixtures("clip")
def test_a_chosen_name(micro_weights, tmp_path):
    done = fdm("extend", "clip.gif", "--length", 16, "--checkpoint", micro_weights, *FAST, cwd=tmp_path)
    assert done.stdout.strip() == "clip-extended-1.gif"
    assert "16x16" in done.stderr


def test_clips_before_and_between(micro_weights, clip, tmp_path):
    """The direction is a matter of the scheme."""
    for scheme, places in {"prepend": range(12, 24), "interpolate": [i * 23 // 11 for i in range(12)]}.items():
        fdm(
            "extend", "clip.gif", "--scheme", scheme, "--length", 24, "--checkpoint", micro_weights, *FAST,
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
def test_a_clip_that_is_none(micro_weights, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    done = fdm("extend", name, "--checkpoint", micro_weights, cwd=tmp_path, check=2)
    assert done.stderr.startswith("error: ")
    assert says in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def extend(micro_weights, folder, *arguments):
    """The result as JSON, the frames, and what was said."""
    done = fdm(
        "extend", *arguments, "--checkpoint", micro_weights, *FAST, "-o", "out.npz", "--json", "--force", cwd=folder
    )
    with np.load(folder / "out.npz") as arrays:
        return json.loads(done.stdout), arrays["frames"], done.stderr


def test_a_bridge_between_two_clips(micro_weights, clip, tmp_path):
    np.savez(tmp_path / "other.npz", frames=255 - clip, fps=5.0)
    result, made, _ = extend(
        micro_weights, tmp_path, "clip.gif", "--use-last", 3, "--until", "other.npz", "--length", 40
    )
    assert (result["scheme"], result["given"], result["fps"]) == ("bridge", [[0, 3], [28, 40]], 12.5)
    assert np.array_equal(made[:3], clip[-3:])
    assert np.array_equal(made[28:], 255 - clip)


def test_a_camera_clip_with_sound(micro_weights, tmp_path):
    camera_clip(tmp_path / "camera.mp4", 322, 178, 9, sound=True)
    result, made, said = extend(micro_weights, tmp_path, "camera.mp4", "--use-last", 5, "--length", 10)
    assert said.startswith(
        "camera.mp4: 322x178 colour 29.97 fps -> centre crop, 16x16 grey; sound dropped; its last 5 frames\n"
    )
    assert result["fps"] == pytest.approx(30000 / 1001)
    alone, _, _ = extend(micro_weights, tmp_path, "camera.mp4", "--use-last", 1, "--length", 3)
    assert alone["fps"] == pytest.approx(30000 / 1001)
    assert np.array_equal(
        made[:5], np.stack([video.fit(frame, 16, 1) for frame in video.read(tmp_path / "camera.mp4")])[-5:]
    )


def test_an_adaptive_scheme_says_what_it_looked_at(micro_weights, clip, tmp_path):
    result, _, _ = extend(
        micro_weights, tmp_path, "clip.gif", "--scheme", "adaptive-autoregressive", "--length", 28,
    )  # fmt: skip
    (report,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert report["embedding"] == result["embedding"] == "pixels"
    for stage in report["stages"]:
        assert len(stage["observed"]) == 8
        assert stage["latent"][0] - 1 in stage["observed"]
    points = [PixelEmbedding()(frame) for frame in video.to_model(clip)]
    first = farthest(np.stack(points), [11], 7)
    assert report["stages"][0]["observed"] == sorted([11, *first])


def test_several_futures_in_one_grid(micro_weights, clip, tmp_path):
    result, made, _ = extend(
        micro_weights, tmp_path, "clip.gif", "--num-samples", 3, "--grid", "--scale", 2, "--length", 20
    )
    assert result["outputs"] == ["out.npz"]
    assert (result["height"], result["width"]) == made.shape[1:3] == (32, 3 * 34 - 2)
    futures = [made[:, ::2, start : start + 32 : 2] for start in (0, 34, 68)]
    for future in futures:
        assert np.array_equal(future[:12], clip)
    assert np.abs(futures[0][12:].astype(int) - futures[1][12:]).mean() > 1


@pytest.mark.usefixtures("clip")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--use-last", 0), "--use-last"),
        (("--until", "clip.gif", "--length", 24), "both clips together have 24 frames"),
        (("--scale", 64, "--grid", "--num-samples", 10_000, "-o", "x.mp4"), "too large for .mp4"),
    ],
)
def test_bad_usage(micro_weights, tmp_path, arguments, says):
    done = fdm("extend", "clip.gif", *arguments, "--checkpoint", micro_weights, *FAST, cwd=tmp_path, check=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["clip.gif"]
