"""Clips of any kind on their way to the model: what is said of them and where they stand."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fdm_cli import config, plan, scheme, video
from fdm_cli.cli.clip import ClipRequest, given_frames, open_clips
from fdm_cli.cli.render import Output
from fdm_cli.errors import BadInput

MODEL = config.load_preset("micro").model  # 16 x 16, grey


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


def given(path, scheme_name="autoregressive", length=None, use_last=None, until=None):
    """What `extend` makes of a clip: the given frames, uint8, by their place, and the rest of it."""
    request = ClipRequest(path, use_last, until)
    loaded = scheme.load(scheme_name)
    with given_frames(request, open_clips(request, loaded), loaded, length, MODEL, path.parent, Output()) as result:
        placed = result.frames(plan.make(loaded, length=result.length, given=result.spans))
        frames = video.to_uint8(torch.stack([placed[place] for place in sorted(placed)]))
        return dict(zip(sorted(placed), frames, strict=True)), result


def numbered(path, count, first=0):
    """A clip whose frames are as bright as their number."""
    levels = np.arange(first, first + count, dtype=np.uint8)
    np.savez(path, frames=np.broadcast_to(levels[:, None, None, None], (count, 8, 8, 1)), fps=12.0)
    return path


def brightness(placed):
    return {place: int(frame[0, 0, 0]) for place, frame in placed.items()}


@pytest.mark.parametrize(
    ("name", "make", "frames", "fps", "says"),
    [
        (
            "camera.mp4",
            lambda path: camera_clip(path, 322, 178, 9, sound=True),
            9,
            29.97,
            "camera.mp4: 322x178 colour 29.97 fps -> centre crop, 16x16 grey; sound dropped",
        ),
        (
            "4k.mp4",
            lambda path: camera_clip(path, 3840, 2160, 3),
            3,
            29.97,
            "4k.mp4: 3840x2160 colour 29.97 fps -> centre crop, 16x16 grey",
        ),
        (
            "transparent.gif",
            transparent_gif,
            9,
            14.29,
            "transparent.gif: 60x40 colour 14.29 fps -> centre crop, 16x16 grey",
        ),
        (
            "variable.gif",
            variable_gif,
            18,
            25,
            "variable.gif: 40x40 grey 25 fps -> 16x16 grey; 9 frames of differing durations, shown as 18 at 25 fps",
        ),
        ("grey.png", grey_apng, 9, 20, "grey.png: 40x50 grey 20 fps -> centre crop, 16x16 grey"),
        ("frames", folder_of_pngs, 9, 10, "frames: 33x21 colour 10 fps -> centre crop, 16x16 grey"),
        (
            "still.jpg",
            lambda path: ball((64, 48), 9).save(path),
            1,
            10,
            "still.jpg: 64x48 colour 10 fps -> centre crop, 16x16 grey",
        ),
    ],
)
def test_clips_of_any_kind(tmp_path, capsys, name, make, frames, fps, says):
    make(tmp_path / name)
    placed, result = given(tmp_path / name)
    assert capsys.readouterr().err.strip() == says
    assert result.fps == pytest.approx(fps, rel=1e-3)
    assert list(placed) == list(range(frames))
    fitted = [video.fit(frame, 16, 1) for frame in video.read(tmp_path / name)]
    assert np.array_equal(np.stack(list(placed.values())), np.stack(fitted))
    assert np.std(fitted) > 5


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_broken_camera_clip(tmp_path, damage):
    camera_clip(tmp_path / "good.mp4", 160, 120, 30)
    data = bytearray((tmp_path / "good.mp4").read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        begin = data.index(b"mdat") + 1500
        data[begin : begin + 3000] = np.random.default_rng(0).integers(0, 256, 3000, np.uint8).tobytes()
    (tmp_path / "bad.mp4").write_bytes(data)
    with pytest.raises(BadInput, match=r"bad.mp4: (truncated|breaks at frame)") as caught:
        given(tmp_path / "bad.mp4")
    assert caught.value.hint.startswith("the file is broken")


def test_durations_that_explode(tmp_path):
    save(tmp_path / "a.gif", [ball((40, 40), x) for x in range(9)], duration=[70, 110, 600_000] * 3)
    with pytest.raises(BadInput, match="9 frames of differing durations make") as caught:
        given(tmp_path / "a.gif")
    assert caught.value.hint == "give it a constant rate first: ffmpeg -i a.gif -r 10 constant.mp4"


def test_a_still_has_no_rate(tmp_path):
    save(tmp_path / "a.gif", [ball((40, 40), 3)], duration=60_000)
    assert given(tmp_path / "a.gif")[1].fps == 10


@pytest.mark.parametrize(
    ("scheme_name", "asked", "length", "places"),
    [
        ("autoregressive", 20, 20, [0, 1, 2, 3]),
        ("adaptive-hierarchy-2", None, 160, [0, 1, 2, 3]),
        ("prepend", 20, 20, [16, 17, 18, 19]),
        ("loop", 20, 20, [0, 1, 2, 3]),
        ("interpolate", 22, 22, [0, 7, 14, 21]),
        ("interpolate", None, 13, [0, 4, 8, 12]),
    ],
)
def test_where_a_clip_stands_is_a_matter_of_the_scheme(tmp_path, scheme_name, asked, length, places):
    placed, result = given(numbered(tmp_path / "a.npz", 4), scheme_name, asked)
    assert brightness(placed) == dict(zip(places, range(4), strict=True))
    assert result.length == length


def test_uneven_slow_motion_is_pointed_out(tmp_path, capsys):
    given(numbered(tmp_path / "a.npz", 4), "interpolate", 20)
    assert "stand 6 or 7 frames apart, so motion may be uneven: --length 19 or 22" in capsys.readouterr().err


def test_the_last_frames_and_a_bridge(tmp_path, capsys):
    first, last = numbered(tmp_path / "a.npz", 9), numbered(tmp_path / "b.npz", 4, first=100)
    assert brightness(given(first, use_last=3)[0]) == {0: 6, 1: 7, 2: 8}
    assert "; its last 3 frames" in capsys.readouterr().err
    given(first, use_last=10)
    assert "warning: --use-last 10: the clip has only 9 frames" in capsys.readouterr().err
    placed, result = given(first, "bridge", 20, use_last=3, until=last)
    assert brightness(placed) == {0: 6, 1: 7, 2: 8, 16: 100, 17: 101, 18: 102, 19: 103}
    assert result.fps == 12
    assert (result.facts["input_frames"], result.facts["until_frames"]) == (3, 4)


@pytest.mark.parametrize(
    ("level", "process", "warns"), [(200, (-0.9, 0.37), 1), (0, (-0.9, 0.37), 0), (200, (0, 1), 0)]
)
def test_a_clip_unlike_what_the_model_was_trained_on_is_pointed_out(tmp_path, capsys, level, process, warns):
    frames = np.zeros((9, 16, 16, 1), np.uint8)
    frames[:, 4:8, 4:8] = 255
    np.savez(tmp_path / "a.npz", frames=np.maximum(frames, level), fps=10)
    request, loaded = ClipRequest(tmp_path / "a.npz"), scheme.load("autoregressive")
    with given_frames(request, open_clips(request, loaded), loaded, None, MODEL, tmp_path, Output()) as result:
        result.warn_of_pixels(config.DiffusionConfig(data_mean=process[0], data_std=process[1]), Output(quiet=True))
    assert capsys.readouterr().err.count("expect frames like those it was trained on") == warns


def test_what_cannot_be(tmp_path):
    clip = numbered(tmp_path / "a.npz", 12)
    for arguments, says in [
        ({"length": 12}, "the clip has 12 frames, the whole video is to have 12"),
        ({"length": 5, "use_last": 5}, "the clip has 5 frames"),
        ({"scheme_name": "bridge"}, "bridge leads from one clip to another"),
        ({"scheme_name": "bridge", "until": clip, "length": 24}, "both clips together have 24 frames"),
        ({"until": clip}, "autoregressive has no place for --until"),
        ({"scheme_name": "bridge", "until": tmp_path / "none.gif"}, "no such file"),
    ]:
        with pytest.raises(BadInput, match=says) as caught:
            given(clip, **arguments)
        assert caught.value.hint or "no such file" in says
    with pytest.raises(BadInput, match="prepend needs given frames"):
        open_clips(None, scheme.load("prepend"))
