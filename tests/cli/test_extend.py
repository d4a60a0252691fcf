import json
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from fdm_cli import video
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


def extend(micro_checkpoint, folder, *arguments):
    """The result as JSON, the frames, and what was said."""
    done = fdm(
        "extend", *arguments, "--checkpoint", micro_checkpoint, *FAST, "-o", "out.npz", "--json", "--force", cwd=folder
    )
    with np.load(folder / "out.npz") as arrays:
        return json.loads(done.stdout), arrays["frames"], done.stderr


def ball(size, x, mode="RGB", background="black", colour="white"):
    image = Image.new(mode, size, background)
    ImageDraw.Draw(image).ellipse((x, size[1] // 3, x + size[1] // 3, 2 * size[1] // 3), fill=colour)
    return image


def save(path, images, **options):
    images[0].save(path, save_all=True, append_images=images[1:], **options)


def camera_clip(path, width, height, frames, sound=False):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        track = container.add_stream("aac", rate=8000) if sound else None
        for index in range(frames):
            picture = np.asarray(ball((width, height), index * width // 40))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        if track:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux([*track.encode(silence), *track.encode()])


def transparent_gif(path):
    clear = (0, 0, 0, 0)
    save(path, [ball((60, 40), x, "RGBA", clear, (0, 0, 200, 255)) for x in range(9)], duration=70, disposal=2)


def variable_gif(path):
    save(path, [ball((40, 40), x) for x in range(9)], duration=[40, 80, 120] * 3)


def grey_apng(path):
    save(path, [ball((40, 50), x, "L", 0, 255) for x in range(9)], duration=50)


def folder_of_pngs(path):
    path.mkdir()
    for x in range(9):
        ball((33, 21), x).save(path / f"{x}.png")


@pytest.mark.parametrize(
    ("name", "make", "frames", "fps", "says"),
    [
        ("camera.mp4", lambda path: camera_clip(path, 322, 178, 9, sound=True), 9, 29.97, "322x178 colour 29.97 fps -> "
         "centre crop, 16x16 grey; sound dropped"),
        ("4k.mp4", lambda path: camera_clip(path, 3840, 2160, 3), 3, 29.97, "3840x2160 colour"),
        ("transparent.gif", transparent_gif, 9, 14.29, "60x40 colour 14.29 fps"),
        ("variable.gif", variable_gif, 18, 25, "9 frames of differing durations, shown as 18 at 25 fps"),
        ("grey.png", grey_apng, 9, 20, "40x50 grey 20 fps"),
        ("frames", folder_of_pngs, 9, 10, "33x21 colour"),
        ("still.jpg", lambda path: ball((64, 48), 9).save(path), 1, 10, "64x48 colour 10 fps"),
    ],
)  # fmt: skip
def test_clips_of_any_kind(micro_checkpoint, tmp_path, name, make, frames, fps, says):
    make(tmp_path / name)
    result, made, said = extend(micro_checkpoint, tmp_path, name, "--length", 24)
    assert says in said
    assert result["given"] == [[0, frames]]
    assert result["fps"] == pytest.approx(fps, rel=1e-3)
    assert made.shape == (24, 16, 16, 1)
    fitted = np.stack([video.fit(frame, 16, 1) for frame in video.read(tmp_path / name)])
    assert np.array_equal(made[:frames], fitted)
    assert fitted.std() > 20


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_broken_camera_clip(micro_checkpoint, tmp_path, damage):
    camera_clip(tmp_path / "good.mp4", 160, 120, 30)
    data = bytearray((tmp_path / "good.mp4").read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        begin = data.index(b"mdat") + 1500
        data[begin : begin + 3000] = np.random.default_rng(0).integers(0, 256, 3000, np.uint8).tobytes()
    (tmp_path / "bad.mp4").write_bytes(data)
    before = sorted(tmp_path.iterdir())
    done = fdm("extend", "bad.mp4", "--checkpoint", micro_checkpoint, *FAST, cwd=tmp_path, check=2)
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: bad.mp4: ")
    assert hint.startswith("hint: the file is broken")
    assert sorted(tmp_path.iterdir()) == before


def test_durations_that_explode(micro_checkpoint, tmp_path):
    save(tmp_path / "a.gif", [ball((40, 40), x) for x in range(9)], duration=[70, 110, 600_000] * 3)
    done = fdm("extend", "a.gif", "--checkpoint", micro_checkpoint, cwd=tmp_path, check=2)
    assert "9 frames of differing durations make" in done.stderr
    assert "hint: give it a constant rate first" in done.stderr


def test_the_last_frames_of_a_clip(micro_checkpoint, clip, tmp_path):
    result, made, said = extend(micro_checkpoint, tmp_path, "clip.gif", "--use-last", 5, "--length", 10)
    assert result["given"] == [[0, 5]]
    assert np.array_equal(made[:5], clip[-5:])
    assert "its last 5 frames" in said


def test_a_bridge_between_two_clips(micro_checkpoint, clip, tmp_path):
    np.savez(tmp_path / "other.npz", frames=255 - clip, fps=5.0)
    result, made, _ = extend(
        micro_checkpoint, tmp_path, "clip.gif", "--use-last", 3, "--until", "other.npz", "--length", 40
    )
    assert (result["scheme"], result["given"], result["fps"]) == ("bridge", [[0, 3], [28, 40]], 12.5)
    assert np.array_equal(made[:3], clip[-3:])
    assert np.array_equal(made[28:], 255 - clip)


def test_slow_motion_is_four_times_slower_unless_a_length_is_asked_for(micro_checkpoint, clip, tmp_path):
    result, made, said = extend(micro_checkpoint, tmp_path, "clip.gif", "--scheme", "interpolate")
    assert (result["frames"], result["fps"]) == (45, 12.5)
    assert np.array_equal(made[::4], clip)
    assert "uneven" not in said
    _, _, said = extend(micro_checkpoint, tmp_path, "clip.gif", "--scheme", "interpolate", "--length", 40)
    assert "3 or 4 frames apart" in said
    assert "--length 34 or 45" in said


def test_a_loop_leads_back_to_the_clip(micro_checkpoint, clip, tmp_path):
    result, made, _ = extend(micro_checkpoint, tmp_path, "clip.gif", "--scheme", "loop", "--length", 40)
    assert result["given"] == [[0, 12]]
    assert np.array_equal(made[:12], clip)


def test_several_futures_in_one_grid(micro_checkpoint, clip, tmp_path):
    result, made, _ = extend(
        micro_checkpoint, tmp_path, "clip.gif", "--num-samples", 3, "--grid", "--scale", 2, "--length", 20
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
        (("--scheme", "bridge"), "bridge leads from one clip to another"),
        (("--scheme", "keyframes", "--until", "clip.gif"), "keyframes has no place for --until"),
        (("--use-last", 0), "--use-last"),
        (("--until", "none.gif"), "no such file: none.gif"),
        (("--until", "clip.gif", "--length", 24), "the clip has 24 frames"),
        (("--scale", 65), "--scale"),
        (("--scale", 64, "--grid", "--num-samples", 10_000, "-o", "x.mp4"), "too large for .mp4"),
    ],
)
def test_bad_usage(micro_checkpoint, tmp_path, arguments, says):
    done = fdm("extend", "clip.gif", *arguments, "--checkpoint", micro_checkpoint, *FAST, cwd=tmp_path, check=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["clip.gif"]
