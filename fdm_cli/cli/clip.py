"""The clips that `fdm extend` takes: opened, read, fitted, and where they stand in the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdm_cli import given as givens
from fdm_cli.cli.render import Output, plural
from fdm_cli.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from fdm_cli.clip import Clip
    from fdm_cli.config import DiffusionConfig, ModelConfig
    from fdm_cli.plan import Plan
    from fdm_cli.scheme import Scheme
    from fdm_cli.video_info import Frame, Video

LOOKED_AT = 32  # frames of a clip


@dataclass(frozen=True)
class ClipRequest:
    """What the user gives: a clip, how much of it, and for `bridge` where it shall lead to."""

    path: Path
    use_last: int | None = None
    until: Path | None = None


@dataclass(frozen=True)
class Given:
    """The given frames of a video, or none.

    Attributes:
        length: N, the frames of the whole video; None leaves it to the scheme.
        spans: where the given frames stand.
        fps: of the clip; None when there is none.
        facts: what the JSON beside the video says of them.
        clip: they are read from; None when there is none.
    """

    length: int | None
    spans: tuple[tuple[int, int], ...] = ()
    fps: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    clip: Clip | None = None

    def frames(self, plan: Plan) -> Mapping[int, Tensor]:
        """The given frames by their number in the plan made for `spans`."""
        if self.clip is None:
            return {}
        return self.clip.placed(plan.given_frames)

    def warn_of_pixels(self, process: DiffusionConfig, output: Output) -> None:
        """Says when a model that knows its data's mean and deviation knows other pixels than the clip has."""
        if self.clip is None or (process.data_mean, process.data_std) == (0, 1):
            return
        import torch

        from fdm_cli.cli.data_report import unlike
        from fdm_cli.picture import spread

        if found := unlike(torch.stack([self.clip[index] for index in spread(len(self.clip), LOOKED_AT)]), process):
            output.warn(
                f"the clip's pixels have mean {found[0]:.2f} and deviation {found[1]:.2f}, the model was trained on "
                f"{process.data_mean:g} and {process.data_std:g}: expect frames like those it was trained on"
            )


def open_clips(request: ClipRequest | None, scheme: Scheme) -> list[Video]:
    """The user's clips, by their headers: whatever is wrong with them or the scheme's wishes is said here.

    Raises:
        BadInput: unreadable clips; a scheme that needs a clip, or two, or none.
    """
    if request is None:
        if scheme.start is None:
            raise BadInput(f"{scheme.name} needs given frames", "fdm extend CLIP, with the same --scheme")
        return []
    if scheme.given == "ends" and request.until is None:
        raise BadInput(f"{scheme.name} leads from one clip to another", "--until FILE names the other")
    if scheme.given != "ends" and request.until is not None:
        raise BadInput(f"{scheme.name} has no place for --until: it leads nowhere", "--scheme bridge")
    from fdm_cli import video

    return [video.read(path) for path in (request.path, request.until) if path is not None]


@contextmanager
def given_frames(
    request: ClipRequest | None,
    videos: list[Video],
    scheme: Scheme,
    length: int | None,
    model: ModelConfig,
    folder: Path,
    output: Output,
) -> Iterator[Given]:
    """Reads the clips and fits them to the model; says in a line each what was done to them.

    Args:
        request: None yields no given frames.
        videos: from `open_clips`.
        scheme: says where the frames stand.
        length: N as it was asked for, or None.
        model: the size and the channels.
        folder: where the frames wait on disk.
        output: for remarks.

    Raises:
        BadInput: a clip breaks somewhere, or leaves nothing to make.
    """
    if request is None:
        yield Given(length)
        return
    from fdm_cli.clip import Clip
    from fdm_cli.plan import check_length
    from fdm_cli.video import describe_fit
    from fdm_cli.video_info import DEFAULT_FPS

    wanted = list(zip(videos, (request.use_last, None), strict=False))
    with Clip(model.image_size, model.image_channels, folder) as clip:
        claims = [min(video.info.frames or 0, last or video.info.frames or 0) for video, last in wanted]
        if length is None:  # too long a result is refused before minutes of reading
            check_length(givens.default_length(scheme, *claims), sum(claims))
        counts: list[int] = []
        for video, last in wanted:
            only = f"; its last {plural(last, 'frame')}" if last and (video.info.frames or last) > last else ""
            output.note(describe_fit(video.info, model.image_size, model.image_channels) + only)
            _refuse_too_many([*counts, claims[len(counts)]], length, request.use_last)
            counts.append(clip.add(_shown(video, output), last=last, most=length and length - 1))
            if last and counts[-1] < last:
                output.warn(f"--use-last {last}: the clip has only {plural(counts[-1], 'frame')}")
        count, until = (*counts, 0)[:2]
        whole = length or givens.default_length(scheme, count, until)
        facts = {
            "input": str(request.path),
            "input_frames": count,
            "use_last": request.use_last,
            "until": str(request.until) if request.until else None,
            "until_frames": until,
            "input_sha256": clip.sha256(),
        }
        if scheme.given == "spread" and count > 1 and (whole - 1) % (count - 1):
            apart = (whole - 1) // (count - 1)
            fewer = f"{apart * (count - 1) + 1} or " if apart > 1 else ""  # at 1 nothing is between them
            output.note(
                f"the clip's frames stand {apart} or {apart + 1} frames apart, so motion may be uneven: "
                f"--length {fewer}{(apart + 1) * (count - 1) + 1} spaces them equally"
            )
        still = videos[0].info.frames == 1  # how long that lasts is no rate
        fps = DEFAULT_FPS if still else videos[0].info.fps
        yield Given(whole, givens.place(scheme, count, whole, until), fps, facts, clip)


def _shown(video: Video, output: Output) -> Iterator[Frame]:
    """The frames of a video, with progress where its header says how many there are."""
    total = video.info.frames
    if total is None:
        yield from video
        return
    with output.progress(total, "frames read") as progress:
        for number, frame in enumerate(video, 1):
            yield frame
            progress.update(min(number, total))


def _refuse_too_many(counts: Sequence[int], length: int | None, use_last: int | None) -> None:
    """Where headers say how many frames there are, the files need not be read to see that they are too many."""
    count = sum(counts)
    if length is not None and count >= length:
        whose = "the clip has" if len(counts) == 1 else "both clips together have"
        fewer = "" if use_last == 1 or length == 1 else ", or --use-last"
        raise BadInput(
            f"{whose} {plural(count, 'frame')}, the whole video is to have {length}",
            f"--length {count + 1} or more{fewer}",
        )
