"""Folders of clips as people have them, good ones and others, made with the tools people use."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from fdm_cli import video
from fdm_cli.video_writer import Writer, open_writer


def moving_square(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A bright square on a dark, coloured ground that wanders to the right, (frames, H, W, 3) uint8."""
    draws = np.random.default_rng(seed)
    side = max(2, min(height, width) // 4)
    ground, colour = draws.integers(0, 100, 3), draws.integers(150, 256, 3)
    top, left = draws.integers(0, height - side + 1), draws.integers(0, width - side + 1)
    made = np.empty((frames, height, width, 3), np.uint8)
    made[:] = ground
    for number, frame in enumerate(made):
        at = (left + 2 * number) % (width - side + 1)
        frame[top : top + side, at : at + side] = colour
    return made


def write_pictures(path: Path, frames: np.ndarray, **options) -> None:
    """A GIF, APNG or WebP, as Pillow writes it."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, loop=0, **options)


def write_container(path: Path, frames: np.ndarray, codec: str = "libx264") -> None:
    """An MP4 or WebM, as libav writes it, 25 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))


def write_images(folder: Path, frames: np.ndarray, suffix: str = ".png") -> None:
    """A folder of numbered images without leading zeros."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame-{number}{suffix}")


def twenty_good_clips(folder: Path, frames: int = 24) -> None:
    """Every kind of file that is read, of several sizes, grey ones among them, in folders within folders."""
    (folder / "deep" / "er").mkdir(parents=True)
    clips = [moving_square(frames + number % 3, 40 + 2 * number, 64 - 2 * number, number) for number in range(20)]
    for number in range(6):
        write_pictures(folder / f"clip-{number}.gif", clips[number])
    for number in range(6, 10):
        write_container(folder / "deep" / f"clip-{number}.mp4", clips[number])
    for number in range(10, 12):
        write_container(folder / "deep" / f"clip-{number}.webm", clips[number], "libvpx-vp9")
    for number in range(12, 14):
        write_pictures(folder / "deep" / "er" / f"clip-{number}.webp", clips[number], lossless=True)
    for number in range(14, 16):
        write_pictures(folder / "deep" / "er" / f"clip-{number}.png", clips[number])
    write_images(folder / "frames-16", clips[16])
    write_images(folder / "frames-17", clips[17], ".jpg")
    np.save(folder / "clip-18.npy", clips[18][..., 0])
    np.savez_compressed(folder / "clip-19.npz", frames=clips[19], fps=30.0)


def others(folder: Path, large: tuple[int, int] = (2000, 3000)) -> None:
    """What lies among good clips: broken, empty, disguised, too short, transparent and huge ones, and a note."""
    frames = moving_square(24, 48, 48)
    (folder / "empty.gif").touch()
    write_container(folder / "truncated.mp4", frames)
    data = (folder / "truncated.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(data[: len(data) // 2])
    (folder / "text.mp4").write_text("This is not a video.\n" * 50)
    write_pictures(folder / "one.gif", frames[:1])
    images = [Image.fromarray(np.dstack([frame, 255 * (frame[..., 0] > 120)]).astype(np.uint8)) for frame in frames]
    images[0].save(folder / "transparent.gif", save_all=True, append_images=images[1:], duration=40, disposal=2)
    write_container(folder / "large.mp4", moving_square(24, *large))
    (folder / "notes.txt").write_text("shot last summer")
    (folder / ".hidden.mp4").write_text("not to be looked at")


def over_gradient(frames: int = 12, height: int = 20, width: int = 24, channels: int = 1) -> np.ndarray:
    """A bright square that moves over a gradient, uint8 (N, H, W, C)."""
    ramp = np.linspace(0, 150, width, dtype=np.uint8)
    array = np.broadcast_to(ramp[:, None], (frames, height, width, channels)).copy()
    for index, frame in enumerate(array):
        frame[4:10, index % (width - 6) : index % (width - 6) + 6, 0] = 255
    return array


def write(path: Path | str, frames: Iterable[np.ndarray], fps: float = 10.0, **options: Any) -> Writer:
    """What our own writer makes of them."""
    with open_writer(Path(path), fps, **options) as writer:
        for frame in frames:
            writer.write(frame)
    return writer


def everything(path: Path) -> np.ndarray:
    """All frames that our own reader finds, (N, H, W, C) uint8."""
    return np.stack(list(video.read(path)))
