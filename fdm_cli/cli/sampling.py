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
from fdm_cli.cli.clip import ClipRequest, given_frames, open_clips
from fdm_cli.cli.render import Output, duration
from fdm_cli.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fdm_cli.checkpoint import Checkpoint
    from fdm_cli.diversity import Diversity
    from fdm_cli.films import Films
    from fdm_cli.plan import Plan
    from fdm_cli.rollout import Sampling


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
    scale: int
    grid: bool
    sheet: bool
    force: bool
    dry_run: bool
    seed: int | None
    device: str
    threads: int | None
    embedding: str
    clip: ClipRequest | None = None


DEFAULT_FPS = 10.0


def make_videos(request: Request, output: Output) -> None:
    """Plans, samples, writes, reports. Whatever can be refused is refused before any work is done."""
    with contextlib.ExitStack() as stack:
        _make_videos(request, output, stack)


def _make_videos(request: Request, output: Output, stack: contextlib.ExitStack) -> None:
    plan_scheme = scheme.load(request.scheme)
    if request.checkpoint is None:
        raise BadInput(
            "no model: --checkpoint FILE is needed", "fdm train --preset micro makes a small one in a few minutes"
        )
    from fdm_cli import diversity, rollout, samplers
    from fdm_cli import plan as planning
    from fdm_cli.checkpoint import load_checkpoint
    from fdm_cli.device import choose_device

    step = samplers.make(request.sampler)
    paths = _output_paths(request, plan_scheme.name)
    clips = open_clips(request.clip, plan_scheme)
    device = choose_device(request.device, request.threads)
    embedding = diversity.make_embedding(request.embedding, device)
    checkpoint = load_checkpoint(request.checkpoint, device)
    given = stack.enter_context(
        given_frames(request.clip, clips, plan_scheme, request.length, checkpoint.config.model, output)
    )
    plan = planning.make(
        plan_scheme,
        length=given.length,
        window=request.window or checkpoint.config.model.window,
        step=request.step,
        given=given.spans,
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
    mixed = request.guidance == 1
    calls = rollout.count_calls(plan, request.num_samples, request.max_batch, mixed=mixed) * len(timesteps)
    if request.dry_run:
        seconds = calls * rollout.seconds_per_call(
            checkpoint, plan, request.num_samples, request.max_batch, request.guidance
        )
        _show_plan(plan, clip_length, len(timesteps), calls, seconds, request, output)
        return
    seed = secrets.randbits(31) if request.seed is None else request.seed
    fps = request.fps or given.fps or DEFAULT_FPS
    output.note(
        f"{plan.length} frames with {plan.scheme}: {plan.calls} windows in {plan.waves} waves, {calls} network calls "
        f"({request.sampler}, {len(timesteps)} steps), seed {seed}"
    )
    report = {
        "frames": plan.length,
        "width": 0,  # these three are known when the files are written
        "height": 0,
        "fps": fps,
        "seed": seed,
        "scheme": plan.scheme,
        "window": plan.window,
        "step": plan.step,
        "given": [list(span) for span in plan.given],
        **given.facts,
        "num_samples": request.num_samples,
        "scale": request.scale,
        "grid": request.grid,
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
    chooser = diversity.Diversity(plan, embedding, request.num_samples) if plan_scheme.adaptive else None
    films, chosen = _write(
        checkpoint, plan, sampling, given.frames(plan), chooser, seed, calls, fps, paths, request, output
    )
    (report["height"], report["width"]), report["fps"] = films.size, films.fps
    seconds = time.monotonic() - began
    report["seconds"] = round(seconds, 3)
    reports = [{"output": str(path), **report} for path in paths]
    if chooser:
        for number, own in enumerate(reports):
            own["embedding"] = request.embedding
            own["chosen"] = chosen if request.grid else chosen[number : number + 1]
    for path, own in zip(paths, reports, strict=True):
        _write_text(_beside(path, ".json"), json.dumps(own, indent=2) + "\n")
    output.note(f"done in {duration(seconds)}")
    result = dict(reports[0], outputs=[str(path) for path in paths])
    output.result(result, "\n".join(map(str, paths)))


def _output_paths(request: Request, scheme_name: str) -> list[Path]:
    """One file per sample, or one for all with --grid, checked: nothing that exists is overwritten without --force."""
    from fdm_cli.video_writer import check_output

    files = 1 if request.grid else request.num_samples
    if request.output is None:
        stem = f"{request.clip.path.stem}-extended" if request.clip else f"sample-{scheme_name}"
        number = 1
        while any(path.exists() for path in _numbered(Path(f"{stem}-{number}.gif"), files)):
            number += 1
        first = Path(f"{stem}-{number}.gif")
    else:
        first = request.output
    paths = _numbered(first, files)
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


def _show_plan(
    plan: Plan, clip_length: int, steps: int, calls: int, seconds: float, request: Request, output: Output
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
    }
    text = (
        f"{plan.length} frames with {plan.scheme} (window {plan.window}, step {plan.step}): {plan.calls} windows in "
        f"{plan.waves} waves\n{calls} network calls ({request.sampler}, {steps} steps a window), "
        f"about {duration(seconds)}\nreaches {plan.reach + 1} frames wide; "
        f"the model was trained on clips of {clip_length}"
    )
    output.result(facts, text)


def _write(
    checkpoint: Checkpoint,
    plan: Plan,
    sampling: Sampling,
    given: Mapping[int, Tensor],
    chooser: Diversity | None,
    seed: int,
    calls: int,
    fps: float,
    paths: list[Path],
    request: Request,
    output: Output,
) -> tuple[Films, list[dict[int, tuple[int, ...]]]]:
    """Samples and writes frame by frame; nothing is left behind when it does not end well.

    Returns:
        the files; for each sample the frames that were observed by the stages that chose them at run time.
    """
    from fdm_cli import rollout, video
    from fdm_cli.films import Films

    side = checkpoint.config.model.image_size
    films = Films(
        paths,
        fps,
        shape=(plan.length, side, side),
        samples=request.num_samples,
        grid=request.grid,
        scale=request.scale,
        sheets=[_beside(path, ".sheet.png") for path in paths] if request.sheet else (),
        force=request.force,
    )
    chosen: list[dict[int, tuple[int, ...]]] = [{} for _ in range(request.num_samples)]
    with films, output.progress(calls, "network calls") as progress:
        for update in rollout.run(
            checkpoint,
            plan,
            sampling,
            seed=seed,
            samples=request.num_samples,
            given=given,
            max_batch=request.max_batch,
            choose=chooser.choose if chooser else None,
        ):
            for job in update.executed:
                if job.stage.choice:
                    chosen[job.sample][job.number] = job.observed
            progress.update(update.network_calls, f"window {update.windows} of {plan.calls * request.num_samples}")
            for frame in update.frames:
                films.write(video.to_uint8(frame))
    for remark in films.remarks:
        output.note(remark)
    if abs(films.fps / fps - 1) > 0.005:
        output.note(f"{fps:.4g} frames per second became {films.fps:.4g}: {paths[0].suffix} counts in whole ticks")
    return films, chosen


def _write_text(path: Path, text: str) -> None:
    from fdm_cli.files import replacing

    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
