"""What `fdm sample` and `fdm extend` share: from options to finished files."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdm_cli import __version__, scheme
from fdm_cli import given as givens
from fdm_cli.cli import memory_report
from fdm_cli.cli.render import Output, duration
from fdm_cli.errors import BadInput, RunFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from fdm_cli.checkpoint import Checkpoint
    from fdm_cli.plan import Plan
    from fdm_cli.rollout import Sampling
    from fdm_cli.scheme import Scheme


@dataclass(frozen=True)
class Request:
    """The options of `sample` and `extend`, as they were given."""

    checkpoint: Path | None
    scheme: str
    length: int | None
    window: int | None
    step: int | None
    num_samples: int
    sampler: str
    sampling_steps: int | None
    guidance: float
    max_batch: int
    output: Path | None
    fps: float | None
    sheet: bool
    force: bool
    dry_run: bool
    seed: int | None
    device: str
    threads: int | None
    memory_budget: str | None


@dataclass(frozen=True)
class Clip:
    """The user's own frames at the model's size: (G, C, H, W) float32, and their rate."""

    frames: Tensor
    fps: float


DEFAULT_FPS = 10.0


def make_videos(request: Request, clip_path: Path | None, output: Output) -> None:
    """Plans, samples, writes, reports. Whatever can be refused is refused before any work is done."""
    plan_scheme = scheme.load(request.scheme)
    if plan_scheme.adaptive:
        raise BadInput(
            f"{plan_scheme.name} chooses frames by their looks, which only inspect-scheme can show so far",
            "--scheme autoregressive or hierarchy-2",
        )
    if request.checkpoint is None:
        raise BadInput(
            "no model: --checkpoint FILE is needed", "fdm train --preset micro makes a small one in a few minutes"
        )
    from fdm_cli import plan as planning
    from fdm_cli import rollout, samplers
    from fdm_cli.checkpoint import load_checkpoint
    from fdm_cli.device import choose_device

    step = samplers.make(request.sampler)
    paths = _output_paths(request, plan_scheme.name, clip_path)
    checkpoint = load_checkpoint(request.checkpoint, choose_device(request.device, request.threads))
    clip = _read_clip(clip_path, checkpoint, output) if clip_path else None
    length = request.length
    if clip is not None:
        length = length or max(plan_scheme.length, 2 * len(clip.frames))
    plan = planning.make(
        plan_scheme,
        length=length,
        window=request.window or checkpoint.config.model.window,
        step=request.step,
        given=_place(plan_scheme, clip, length or plan_scheme.length),
    )
    clip_length = checkpoint.config.data.clip_length
    if plan.reach >= clip_length:
        output.warn(
            f"the scheme reaches {plan.reach + 1} frames wide, the model was trained on clips of {clip_length}: "
            "expect poor frames"
        )
    timesteps = samplers.choose_timesteps(
        checkpoint.process.timesteps,
        request.sampling_steps or min(samplers.DEFAULT_STEPS[request.sampler], checkpoint.process.timesteps),
    )
    sampling = rollout.Sampling(step, timesteps, request.guidance)
    positions = [frame for start, stop in plan.given for frame in range(start, stop)]
    given = dict(zip(positions, clip.frames, strict=True)) if clip else {}
    calls = rollout.count_calls(plan, request.num_samples, request.max_batch) * len(timesteps)
    device = next(checkpoint.model.parameters()).device
    budget = memory_report.sampling_budget(request.memory_budget, checkpoint, device)
    # The widest wave, cut into batches; every window as long as the plan allows.
    largest_call = min(max(len(wave) for wave in plan.by_wave()) * request.num_samples, request.max_batch)
    memory_report.check_sampling(checkpoint, largest_call, plan.window, budget, device, output)
    if request.dry_run:
        memory = memory_report.sampling_plan(checkpoint, largest_call, plan.window, budget, device)
        seconds = calls * rollout.seconds_per_call(
            checkpoint, plan, request.num_samples, request.max_batch, request.guidance
        )
        _show_plan(plan, clip_length, len(timesteps), calls, seconds, memory, request, output)
        return
    seed = secrets.randbits(31) if request.seed is None else request.seed
    fps = request.fps or (clip.fps if clip else DEFAULT_FPS)
    output.note(
        f"{plan.length} frames with {plan.scheme}: {plan.calls} windows in {plan.waves} waves, {calls} network calls "
        f"({request.sampler}, {len(timesteps)} steps), seed {seed}"
    )
    report = {
        "frames": plan.length,
        "width": checkpoint.config.model.image_size,
        "height": checkpoint.config.model.image_size,
        "fps": fps,  # the format's own rate comes in its place: a GIF counts in hundredths of a second
        "seed": seed,
        "scheme": plan.scheme,
        "window": plan.window,
        "step": plan.step,
        "given": [list(span) for span in plan.given],
        "sampler": request.sampler,
        "sampling_steps": len(timesteps),
        "guidance": request.guidance,
        "network_calls": calls,
        "max_batch": request.max_batch,
        "checkpoint": str(request.checkpoint),
        "checkpoint_sha256": checkpoint.sha256,
        "fdm": __version__,
    }
    began = time.monotonic()
    report["fps"] = _write(checkpoint, plan, sampling, given, seed, calls, fps, paths, request, output)
    seconds = time.monotonic() - began
    report["seconds"] = round(seconds, 3)
    reports = [{"output": str(path), **report} for path in paths]
    for path, own in zip(paths, reports, strict=True):
        _write_text(_beside(path, ".json"), json.dumps(own, indent=2) + "\n")
    output.note(f"done in {duration(seconds)}")
    result = dict(reports[0], outputs=[str(path) for path in paths])
    output.result(result, "\n".join(map(str, paths)))


def _output_paths(request: Request, scheme_name: str, clip: Path | None) -> list[Path]:
    """One file per sample, checked: nothing that exists is overwritten without --force."""
    from fdm_cli.video_writer import check_output

    if request.output is None:
        stem = f"{clip.stem}-extended" if clip else f"sample-{scheme_name}"
        number = 1
        while any(path.exists() for path in _numbered(Path(f"{stem}-{number}.gif"), request.num_samples)):
            number += 1
        first = Path(f"{stem}-{number}.gif")
    else:
        first = request.output
    paths = _numbered(first, request.num_samples)
    for path in paths:
        check_output(path, force=request.force)
        extras = [_beside(path, ".json")] + ([_beside(path, ".sheet.png")] if request.sheet else [])
        for extra in extras:
            if extra.exists() and not request.force:
                raise BadInput(f"{extra} exists", "--force overwrites it; --output names another file")
    return paths


def _numbered(path: Path, count: int) -> list[Path]:
    """The name itself for one sample, else name-1, name-2, ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _read_clip(path: Path, checkpoint: Checkpoint, output: Output) -> Clip:
    import numpy as np

    from fdm_cli import video

    model = checkpoint.config.model
    clip = video.read(path)
    output.note(video.describe_fit(clip.info, model.image_size, model.image_channels))
    frames = [video.fit(frame, model.image_size, model.image_channels) for frame in clip]
    return Clip(video.to_model(np.stack(frames)), clip.info.fps)


def _place(plan_scheme: Scheme, clip: Clip | None, length: int) -> tuple[tuple[int, int], ...]:
    """Where the clip's frames stand."""
    if clip is None:
        if plan_scheme.start is None:
            raise BadInput(f"{plan_scheme.name} needs given frames", f"fdm extend CLIP --scheme {plan_scheme.name}")
        return ()
    count = len(clip.frames)
    if plan_scheme.given == "ends":
        raise BadInput(
            f"{plan_scheme.name} leads from a first clip to a last one", "take another --scheme for one clip"
        )
    if count >= length:
        raise BadInput(
            f"the clip has {count} frames, the whole video is to have {length}", f"--length {count + 1} or more"
        )
    return givens.place(plan_scheme, count, length)


def _show_plan(
    plan: Plan,
    clip_length: int,
    steps: int,
    calls: int,
    seconds: float,
    memory: tuple[dict[str, Any] | None, str],
    request: Request,
    output: Output,
) -> None:
    facts: dict[str, Any] = {
        "scheme": plan.scheme,
        "length": plan.length,
        "window": plan.window,
        "step": plan.step,
        "given": [list(span) for span in plan.given],
        "num_samples": request.num_samples,
        "calls": plan.calls,
        "waves": plan.waves,
        "sampler": request.sampler,
        "sampling_steps": steps,
        "network_calls": calls,
        "reach": plan.reach,
        "clip_length": clip_length,
        "estimated_seconds": round(seconds, 1),
        "memory": memory[0],
    }
    text = (
        f"{plan.length} frames with {plan.scheme} (window {plan.window}, step {plan.step}): {plan.calls} windows in "
        f"{plan.waves} waves\n{calls} network calls ({request.sampler}, {steps} steps a window), "
        f"about {duration(seconds)}\nreaches {plan.reach + 1} frames wide; "
        f"the model was trained on clips of {clip_length}\n{memory[1]}"
    )
    output.result(facts, text)


def _write(
    checkpoint: Checkpoint,
    plan: Plan,
    sampling: Sampling,
    given: dict[int, Tensor],
    seed: int,
    calls: int,
    fps: float,
    paths: list[Path],
    request: Request,
    output: Output,
) -> float:
    """Samples and writes frame by frame; nothing is left behind when it does not end well.

    Returns:
        The real rate of what was written, in frames per second.
    """
    import torch

    from fdm_cli import picture, rollout, video
    from fdm_cli.video_writer import open_writer

    shown = set(picture.spread(plan.length)) if request.sheet else set()
    sheets: list[list[tuple[int, NDArray[np.uint8]]]] = [[] for _ in paths]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(open_writer(path, fps, frames=plan.length, force=request.force)) for path in paths
        ]
        progress = stack.enter_context(output.progress(calls, "network calls"))
        written = 0
        for update in rollout.run(
            checkpoint,
            plan,
            sampling,
            seed=seed,
            samples=len(paths),
            given=given,
            max_batch=request.max_batch,
        ):
            progress.update(update.network_calls, f"window {update.windows} of {plan.calls * len(paths)}")
            for frame in update.frames:
                for sample, (writer, pixels) in enumerate(zip(writers, video.to_uint8(frame), strict=True)):
                    writer.write(pixels)
                    if written in shown:
                        sheets[sample].append((written, pixels))
                written += 1
            if not torch.isfinite(torch.cat([frame.flatten() for frame in update.frames] or [torch.zeros(1)])).all():
                raise RunFailed("the model made frames that are not numbers", "is it trained?")
    for remark in writers[0].remarks:
        output.note(remark)
    for path, sheet in zip(paths, sheets, strict=True):
        if sheet:
            frames = [pixels for _, pixels in sheet]
            labels = [str(number) for number, _ in sheet]
            drawn = picture.contact_sheet(frames, labels=labels)
            picture.write_png(_beside(path, ".sheet.png"), drawn, force=request.force)
    return writers[0].fps


def _write_text(path: Path, text: str) -> None:
    from fdm_cli.files import replacing

    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
