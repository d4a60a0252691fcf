import io
import itertools
import os
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fdm_cli import video
from fdm_cli.errors import BadInput
from tests import clips
from tests.clips import everything, over_gradient, write

SEED = np.random.default_rng(7)


# Pictures from elsewhere.


def pillow_gif(path, images, **options):
    images[0].save(path, save_all=True, append_images=images[1:], **options)


def grey_images(*levels):
    return [Image.new("L", (6, 4), level) for level in levels]


def test_merged_frames_come_back_by_their_durations(tmp_path):
    pillow_gif(tmp_path / "a.gif", grey_images(0, 90, 90, 90, 180), duration=80)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3
    read = video.read(tmp_path / "a.gif")
    assert (read.info.frames, read.info.fps, read.info.channels) == (5, 12.5, 1)
    assert [int(frame[0, 0, 0]) for frame in read] == [0, 90, 90, 90, 180]
    assert "3 frames of differing durations" in read.info.remarks[0]


@pytest.mark.parametrize(("suffix", "save"), [("gif", {}), ("png", {}), ("webp", {"lossless": True})])
def test_differing_durations_use_the_shortest_tick(tmp_path, suffix, save):
    path = tmp_path / f"a.{suffix}"
    pillow_gif(path, grey_images(0, 90, 180), duration=[40, 100, 60], **save)
    read = video.read(path)
    assert read.info.fps == 50
    assert [int(frame[0, 0, 0]) for frame in read] == [0] * 2 + [90] * 5 + [180] * 3


@pytest.mark.parametrize(
    ("suffix", "durations", "fps", "shown"),
    [
        ("gif", [30, 30, 40, 30, 30, 40], 100 / 3.3333, [1] * 6),
        ("gif", [40, 40, 50, 40, 40, 40], 24, [1] * 6),
        ("gif", [70, 60, 130, 70], 100 / 6.6, [1, 1, 2, 1]),  # the third one stands for two
        ("webp", [33, 33, 34], 30, [1] * 3),
        ("webp", [17, 17, 16], 60, [1] * 3),
        ("webp", [41, 42, 84, 41], 120 / 4.992, [1, 1, 2, 1]),
        ("webp", [30, 30, 40], 30, [1] * 3),  # was a GIF
        ("png", [16, 17, 17], 60, [1] * 3),
        ("png", [20, 50, 20], 100 / 2.25, [1, 2, 1]),
    ],
)
def test_a_rate_that_the_unit_of_time_does_not_hold(tmp_path, suffix, durations, fps, shown):
    path, save = tmp_path / f"a.{suffix}", {"lossless": True} if suffix == "webp" else {}
    levels = [40 * number for number in range(len(durations))]
    pillow_gif(path, grey_images(*levels), duration=durations, **save)
    read = video.read(path)
    assert read.info.fps == pytest.approx(fps, rel=2e-3)
    expected = [level for level, times in zip(levels, shown, strict=True) for _ in range(times)]
    assert [int(frame[0, 0, 0]) for frame in read] == expected


def test_durations_that_explode_are_refused(tmp_path):
    pillow_gif(tmp_path / "a.gif", grey_images(0, 90, 180), duration=[70, 110, 600_000])
    with pytest.raises(BadInput, match="3 frames of differing durations make 60018") as caught:
        video.probe(tmp_path / "a.gif")
    assert caught.value.hint


def test_zero_durations_are_a_tenth_of_a_second(tmp_path):
    pillow_gif(tmp_path / "a.gif", grey_images(0, 90, 180), duration=0)
    info = video.probe(tmp_path / "a.gif")
    assert (info.frames, info.fps) == (3, 10)


def test_transparency_is_composed(tmp_path):
    images = []
    for index in range(3):
        image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        image.paste((200, 0, 0, 255), (index, 0, index + 2, 2))
        images.append(image)
    pillow_gif(tmp_path / "a.gif", images, duration=100, disposal=2)
    pillow_gif(tmp_path / "a.png", images, duration=100, disposal=1)
    for name in ("a.gif", "a.png"):
        frames = everything(tmp_path / name)
        assert frames.shape == (3, 8, 8, 3)
        for index, frame in enumerate(frames):
            red = (frame == (200, 0, 0)).all(-1)
            assert red.sum() == 4
            assert red[0, index]
            assert (frame[~red] == 255).all()


def test_transparency_of_a_container_is_composed(tmp_path):
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=10, width=8, height=8, pix_fmt="argb")
        for index in range(3):
            image = np.zeros((8, 8, 4), np.uint8)  # alpha, red, green, blue
            image[0:2, index : index + 2] = (255, 200, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="argb")))
        container.mux(stream.encode())
    for index, frame in enumerate(everything(tmp_path / "a.mov")):
        red = (frame == (200, 0, 0)).all(-1)
        assert red.sum() == 4
        assert red[0, index]
        assert (frame[~red] == 255).all()


def test_half_transparent_pixels_are_mixed(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 102)).save(tmp_path / "a.png")
    assert (everything(tmp_path / "a.png") == 153).all()


def test_colour_gif_with_local_palettes(tmp_path):
    images = [Image.new("RGB", (5, 3), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    pillow_gif(tmp_path / "a.gif", images, duration=50)
    frames = everything(tmp_path / "a.gif")
    assert frames[:, 0, 0].tolist() == [[250, 0, 0], [0, 250, 0]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_one_image_is_a_video_of_one_frame(tmp_path, mode):
    Image.new(mode, (6, 4), 40000 if mode == "I;16" else None).save(tmp_path / "a.png")
    read = video.read(tmp_path / "a.png")
    (frame,) = read
    assert frame.shape == (4, 6, 1 if mode in ("1", "L", "LA", "I;16") else 3)
    assert read.info.frames == 1
    if mode == "I;16":
        assert (frame == 40000 >> 8).all()


def test_fallback_image_of_an_apng_is_no_frame(tmp_path):
    images = grey_images(10, 20, 30)
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:], default_image=True, duration=100)
    assert [int(frame[0, 0, 0]) for frame in video.read(tmp_path / "a.png")] == [20, 30]


def test_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), (9, 9, 9)).save(tmp_path / "a.jpg", exif=exif)
    assert everything(tmp_path / "a.jpg").shape == (1, 6, 4, 3)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_turned_or_mirrored(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new(mode, (32, 16))
    image.paste(200 if mode == "L" else (200, 200, 200), (0, 0, 8, 8))  # in one corner
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "a.jpg") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    (frame,) = everything(tmp_path / "a.jpg")
    assert np.array_equal(frame, expected.reshape(frame.shape))


def test_transparency_of_16_bit_grey_is_composed(tmp_path):
    levels = np.full((4, 4), 0x4000, np.uint16)
    levels[0, 0] = 7
    Image.fromarray(levels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    chunk = b"tRNS" + struct.pack(">H", 7)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:at] + chunk + data[at:])
    (frame,) = everything(tmp_path / "a.png")
    assert frame[0, 0, 0] == 255
    assert (frame.ravel()[1:] == 0x40).all()


def test_a_folder_called_tilde_is_no_home(tmp_path, monkeypatch):
    for folder, level in (("~", 10), ("home", 99)):
        (tmp_path / folder).mkdir()
        Image.new("L", (4, 4), level).save(tmp_path / folder / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (everything(Path("~") / "a.png") == 10).all()


def test_folder_is_read_in_natural_order(tmp_path):
    for index in (10, 2, 1):
        Image.new("L", (4, 4), index).save(tmp_path / f"frame-{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    for sheet in ("a.gif.sheet.png", "data.clips.png"):
        Image.new("L", (9, 9)).save(tmp_path / sheet)
    assert [int(frame[0, 0, 0]) for frame in video.read(tmp_path)] == [1, 2, 10]
    Image.new("RGB", (4, 4), (5, 6, 7)).save(tmp_path / "frame-11.png")
    assert everything(tmp_path)[-2:, 0, 0].tolist() == [[10, 10, 10], [5, 6, 7]]
    Image.new("L", (5, 4)).save(tmp_path / "frame-12.png")
    with pytest.raises(BadInput, match=r"frame-12.png: 5x4, but frame-1.png is 4x4"):
        video.read(tmp_path)


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 5, 7, 1), (3, 5, 7, 3)])
@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_arrays(tmp_path, shape, save):
    array = SEED.integers(0, 256, shape, np.uint8)
    path = tmp_path / ("a.npy" if save is np.save else "a.npz")
    save(path, array)
    assert np.array_equal(everything(path), array.reshape(3, 5, 7, -1))


def test_container_without_a_count_and_with_sound(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 16, 8, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        for frame in over_gradient(9, 8, 16, channels=3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux([*sound.encode(silence), *sound.encode()])
    read = video.read(tmp_path / "a.mkv")
    assert (read.info.frames, read.info.fps, read.info.has_sound) == (None, 25, True)
    assert len(list(read)) == 9
    line = video.describe_fit(read.info, 32, 1)
    assert line == "a.mkv: 16x8 colour 25 fps -> centre crop, 32x32 grey; sound dropped"
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "b.mkv").write_bytes(data[:-40])
    with pytest.raises(BadInput, match="truncated"):
        video.read(tmp_path / "b.mkv")


def test_a_recording_that_does_not_say_its_rate(tmp_path):
    """As browsers write them: times in milliseconds, and no duration of a frame."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libvpx", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 16, 8, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        times = np.cumsum(SEED.integers(20, 61, 200))
        for instant, frame in zip(times, over_gradient(200, 8, 16, channels=3), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = int(instant)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    data = (tmp_path / "a.mkv").read_bytes()
    default_duration = b"\x23\xe3\x83"
    assert data.count(default_duration) == 1
    at = data.index(default_duration)
    (tmp_path / "a.mkv").write_bytes(data[:at] + b"\xec\x86" + bytes(6) + data[at + 8 :])  # void instead
    read = video.read(tmp_path / "a.mkv")
    assert read.info.fps == pytest.approx(25, rel=0.05)
    assert len(list(read)) == 200


def test_tags_in_another_encoding(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        container.metadata["title"] = "caf??"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for frame in over_gradient(3, 16, 16, channels=3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "a.avi").read_bytes()
    assert data.count(b"caf??") == 1
    (tmp_path / "a.avi").write_bytes(data.replace(b"caf??", b"caf\xe9!"))
    assert len(everything(tmp_path / "a.avi")) == 3


@pytest.mark.parametrize("trailer", [b"\n", bytes(4), b"8db42d694ccc418790edff439fe026bf", b"SEFHk\0\0\0\1\0\0\0SEFT"])
def test_what_cameras_append_is_no_damage(tmp_path, trailer):
    write(tmp_path / "a.mp4", over_gradient(5, 16, 16))
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data + trailer)
    assert len(everything(tmp_path / "a.mp4")) == 5
    (tmp_path / "a.mp4").write_bytes(data[:-20])
    with pytest.raises(BadInput, match=r"truncated|cannot be read"):
        video.read(tmp_path / "a.mp4")


def test_video_of_a_camera_held_upright(tmp_path):
    frame = np.zeros((16, 32, 1), np.uint8)
    frame[:, :16] = 200
    write(tmp_path / "a.mp4", [frame] * 2)
    data = (tmp_path / "a.mp4").read_bytes()
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # to be shown turned clockwise
    at = data.index(plain, data.index(b"tkhd"))
    (tmp_path / "a.mp4").write_bytes(data[:at] + turned + data[at + 36 :])
    frames = everything(tmp_path / "a.mp4")
    assert frames.shape == (2, 32, 16, 3)
    assert frames[:, 2:14].mean() > 190
    assert frames[:, 18:30].mean() < 10


def test_a_video_can_be_read_twice(tmp_path):
    write(tmp_path / "a.gif", over_gradient(3))
    read = video.read(tmp_path / "a.gif")
    assert np.array_equal(np.stack(list(read)), np.stack(list(read)))


# Broken and hostile files.


def gif_bytes(width, height, frames=1):
    """A GIF that claims much and holds next to nothing."""
    one = b"\x21\xf9\x04\0\x0a\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x01\x4c\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + one * frames + b";"


def png_bytes(width, height):
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + bytes(4)
        for name, body in [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IEND", b"")]
    )


def webp_bytes(*names):
    """Chunks of no use, of 6 bytes each."""
    chunks = b"".join(name + struct.pack("<I", 6) + bytes(6) for name in names)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def npz_bytes(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy_bytes(array, *, allow_pickle=False):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def claims(shape, descr="|u1"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.gif", b"", "empty file"),
        ("a.mp4", b"", "empty file"),
        ("a.npz", b"", "empty file"),
        ("a.gif", b"hello, this is text", "not a GIF file"),
        ("a.mp4", b"hello, this is text", "not a MP4 file"),
        ("a.npy", b"hello, this is text", "not a NPY file"),
        ("a.gif", png_bytes(4, 4), "holds a PNG file, not a GIF"),
        ("a.mp4", gif_bytes(4, 4), "holds a GIF file, not a MP4"),
        ("a.txt", b"text", "unsupported kind of file '.txt'"),
        ("a", b"text", "unsupported kind of file ''"),
        ("a.gif", gif_bytes(13000, 13000), "claims frames of 13000x13000"),
        ("a.gif", gif_bytes(9000, 9000, 5), "claims frames of 9000x9000"),
        ("a.gif", gif_bytes(6000, 6000, 300), "claims 300 frames of 6000x6000"),
        ("a.gif", gif_bytes(6000, 6000, 277), "6114 bytes claim 277 frames of 6000x6000"),
        ("a.gif", gif_bytes(1, 1, 200_000), "claims more than 150000 frames"),
        ("a.gif", gif_bytes(1, 1)[:10] + gif_bytes(60000, 60000)[10:], "claims frames of 60000x60000"),
        ("a.gif", gif_bytes(1, 1)[:10] + gif_bytes(6000, 6000, 300)[10:], "claims 300 frames of 6000x6000"),
        ("a.gif", gif_bytes(0, 5), "0x5"),
        ("a.gif", gif_bytes(5, 5, 0), "no frames"),
        ("a.gif", b"GIF89a", "ends too early"),
        ("a.png", png_bytes(50000, 50000), "claims frames of 50000x50000"),
        ("a.png", png_bytes(4, 4)[:-6], "truncated|ends too early"),
        ("a.png", png_bytes(4, 4)[:33] + png_bytes(9000, 9000)[8:], "broken at byte 33"),
        ("a.webp", webp_bytes(b"VP8L", b"VP8X"), "broken at byte 26"),
        ("a.bmp", b"BM" + bytes(60), "cannot be read"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(60), "cannot be read"),
        ("a.webp", b"RIFF\xff\0\0\0WEBPVP8L", "truncated"),
        ("a.mp4", b"\0\0\0\x18ftypmp42" + bytes(12) + b"\0\0\xff\xffmdat", "truncated"),
        ("a.mp4", b"\0\0\0\x18ftypmp42" + bytes(12) + b"\0\0\0\x08mdat", "cannot be read"),
        ("a.avi", b"RIFF\xff\0\0\0AVI LIST", "truncated"),
        ("a.webm", b"\x1a\x45\xdf\xa3" + bytes(40), "cannot be read|truncated"),
        ("a.npy", npy_bytes(np.zeros((2, 4, 4), np.uint8))[:-3], "cannot be read"),
        ("a.npy", npy_bytes(np.zeros((2, 4, 4), np.float32)), r"holds float32 \(2, 4, 4\), not a video"),
        ("a.npy", npy_bytes(np.zeros((20, 9, 64, 64), np.uint8)), r"holds uint8 \(20, 9, 64, 64\), not a video"),
        ("a.npy", npy_bytes(np.zeros((0, 4, 4), np.uint8)), "no frames"),
        ("a.npy", npy_bytes(np.array([print], object), allow_pickle=True), "cannot be read"),
        ("a.npy", claims((10**6, 10**6, 10**6)), "cannot be read"),
        ("a.npz", npz_bytes(frames=claims((10**6, 100, 100))), "holds 0 bytes of frames where"),
        ("a.npz", npz_bytes(frames=claims((1, 10**6, 10**6))), "claims frames of 1000000x1000000"),
        ("a.npz", npz_bytes(frames=npy_bytes(np.array([print], object), allow_pickle=True)), "not a video"),
        ("a.npz", npz_bytes(frames=claims((10**6, 8, 8)) + bytes(8 * 8 * 10**6)), "bytes claim 1000000 frames of 8x8"),
        ("a.npz", npz_bytes(x=b"", y=b""), "no array 'frames'"),
        ("a.npz", npz_bytes(frames=claims((1, 1, 1)) + b"a", fps=npy_bytes(float("nan"))), "rate is nan"),
        ("a.npz", npz_bytes(frames=claims((1, 1, 1)) + b"a", fps=npy_bytes([10, 20])), "fps is no number"),
        ("a.npz", npz_bytes(frames=claims((1, 1, 1)) + b"a", fps=claims((10**14,))), "fps is no number"),
        ("a.npz", npz_bytes(frames=npy_bytes(np.zeros((2, 4, 4), np.uint8)))[:-30], "cannot be read"),
    ],
)
def test_unusable_files_are_refused_before_decoding(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    start = time.process_time()
    with pytest.raises(BadInput, match=says) as caught:
        video.read(tmp_path / name)
    assert time.process_time() - start < 2
    assert name in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.webp", "a.apng", "a.npz"])
def test_a_file_cut_anywhere_is_an_error_or_reads(tmp_path, name):
    write(tmp_path / name, over_gradient(6, channels=3))
    data = (tmp_path / name).read_bytes()
    refused = 0
    for cut in np.linspace(1, len(data) - 1, 40).astype(int):
        (tmp_path / name).write_bytes(data[:cut])
        try:
            assert len(everything(tmp_path / name)) <= 6
        except BadInput as error:
            refused += 1
            assert name in error.message  # noqa: PT017
    assert refused >= 39


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.webp", "a.apng", "a.npz"])
def test_flipped_bits_end_in_an_error_or_in_frames(tmp_path, name):
    write(tmp_path / name, over_gradient(4, channels=3))
    good = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(40):
        bad = bytearray(good)
        for position in rng.integers(0, len(bad), 3):
            bad[position] ^= int(rng.integers(1, 256))
        (tmp_path / name).write_bytes(bad)
        try:
            for _ in itertools.islice(video.read(tmp_path / name), 50):
                pass
        except BadInput as error:
            assert name in error.message  # noqa: PT017


def test_a_file_that_breaks_in_the_middle_yields_what_is_good_and_names_the_frame(tmp_path):
    write(tmp_path / "a.apng", over_gradient(6))
    data = bytearray((tmp_path / "a.apng").read_bytes())
    third = [index for index in range(len(data)) if data[index : index + 4] == b"fdAT"][2]
    data[third + 8 : third + 20] = bytes(12)
    (tmp_path / "a.apng").write_bytes(data)
    frames = []
    with pytest.raises(BadInput, match=r"a.apng: breaks at frame 3") as caught:
        frames.extend(video.read(tmp_path / "a.apng"))
    assert caught.value.hint


def test_missing_files_and_odd_ones(tmp_path):
    os.mkfifo(tmp_path / "pipe.gif")
    for path, says in [
        (tmp_path / "none.gif", "no such file"),
        (tmp_path / "pipe.gif", "not a regular file"),
        (tmp_path, "without images"),
    ]:
        with pytest.raises(BadInput, match=says):
            video.probe(path)


# To the model and back.


def test_model_values_and_back_are_exact():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    tensor = video.to_model(levels)
    assert (tensor.dtype, tensor.shape) == (torch.float32, (1, 1, 16, 16))
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(video.to_uint8(tensor), levels)
    colour = SEED.integers(0, 256, (2, 3, 4, 3), np.uint8)
    assert np.array_equal(video.to_uint8(video.to_model(colour)), colour)
    assert torch.equal(video.to_model(colour)[:, 1:2], video.to_model(colour[..., 1:2]))
    assert video.to_uint8(torch.tensor([-9.0, 9.0, 0.003, 0.005]).reshape(4, 1, 1, 1)).ravel().tolist() == [
        0,
        255,
        128,
        128,
    ]


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(1, 40), st.sampled_from([1, 3]))
@settings(max_examples=60)
def test_fit_gives_the_models_shape_and_keeps_the_mean(height, width, channels, size, wanted):
    flat = np.full((2, 3, height, width, channels), 77, np.uint8)
    fitted = video.fit(flat, size, wanted)
    assert fitted.shape == (2, 3, size, size, wanted)
    assert (fitted == 77).all()


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_fit_downwards_is_the_mean_of_the_area(size, factor, seed):
    frame = np.random.default_rng(seed).integers(0, 256, (size * factor, size * factor, 1), np.uint8)
    means = frame.reshape(size, factor, size, factor).mean((1, 3))
    assert np.abs(video.fit(frame, size, 1)[..., 0] - means).max() <= 1


def test_fit_leaves_alone_what_fits_and_crops_the_centre():
    frames = SEED.integers(0, 256, (2, 8, 8, 3), np.uint8)
    assert video.fit(frames, 8, 3) is frames
    wide = SEED.integers(0, 256, (4, 10, 1), np.uint8)
    assert np.array_equal(video.fit(wide, 4, 1), wide[:, 3:7])
    assert np.array_equal(video.fit(wide, 4, 3), wide[:, 3:7].repeat(3, -1))
    assert video.fit(np.array([[[255, 0, 0]]], np.uint8), 1, 1).item() == 76  # 0.299 of 255


def test_importing_is_light():
    code = (
        "import sys, fdm_cli.video, fdm_cli.video_writer;"
        "print([name for name in ('torch', 'av', 'PIL', 'imageio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_says_nothing_on_its_own(tmp_path, capfd):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(12) + b"\0\0\0\x08mdat")
    with pytest.raises(BadInput):
        video.read(tmp_path / "a.mp4")
    assert capfd.readouterr() == ("", "")


def test_an_animation_is_no_frame_of_a_folder(tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(2):
        clips.write_pictures(tmp_path / "frames" / f"{number}.webp", clips.moving_square(5, 10, 14, number))
    with pytest.raises(BadInput, match=r"0\.webp: an animation among the images"):
        video.read(tmp_path / "frames")
