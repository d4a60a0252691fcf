"""What `fdm sample` and `fdm extend` share: from options to finished files."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdm_cli import __version__, scheme
from fdm_cli.cli import memory_report, options
from fdm_cli.cli.clip import ClipRequest, given_frames, open_clips
from fdm_cli.cli.outputs import Outputs, beside, write_report
from fdm_cli.cli.plan_report import as_data, warn_of_blind, warn_of_reach, warn_of_window
from fdm_cli.cli.render import Output, duration, plural
from fdm_cli.errors import BadInput, Interrupted, RunFailed

if TYPE_CHECKING:
    from fdm_cli.batch import Sampling
    from fdm_cli.films import Films
    from fdm_cli.plan import Plan, Stage
    from fdm_cli.rollout import Update


@dataclass(frozen=True, kw_only=True)
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
    eta: float
    guidance: float | None
    max_batch: int | None
    output: Path | None
    fps: float | None
    scale: int
    grid: bool
    sheet: bool
    force: bool
    resume: bool
    dry_run: bool
    seed: int | None
    device: str
    threads: int | None
    memory_budget: str | None
    embedding: str
    compile: bool
    clip: ClipRequest | None = None


# What decides the frames, of what the report says: a run is resumed only where all of it is the same.
_DECISIVE = (
    "checkpoint_sha256", "scheme", "frames", "window", "step", "given", "input_sha256", "num_samples", "seed",
    "sampler", "sampling_steps", "eta", "guidance", "embedding", "compile", "max_batch", "processes", "device",
    "threads", "fdm", "torch", "plan_sha256",
)  # fmt: skip


def make_videos(request: Request, output: Output) -> None:
    """Plans, samples, writes, reports. Whatever can be refused is refused before any work is done."""
    with contextlib.ExitStack() as stack:
        result = _make_videos(request, output, stack)
    if result is not None:  # shown when nothing is left to be put away: stdout may be broken
        output.result(*result)


def _make_videos(request: Request, output: Output, stack: contextlib.ExitStack) -> tuple[dict[str, Any], str] | None:
    """The result as JSON and as text; None for all but one of several processes."""
    from fdm_cli.distributed import joined

    ranks = stack.enter_context(joined())
    plan_scheme = scheme.load(request.scheme)
    import torch

    from fdm_cli import batch, compiled, diversity, rollout, samplers
    from fdm_cli import plan as planning
    from fdm_cli.checkpoint import load_checkpoint
    from fdm_cli.device import choose_device
    from fdm_cli.video_info import DEFAULT_FPS

    samplers.make(request.sampler, request.eta)  # a misspelt name is said before the model is read
    diversity.check_embedding(request.embedding)
    if ranks.rank:
        output = Output(mute=True)
    model_file = options.model_file(request.checkpoint, output)
    files = ranks.share(lambda: _outputs(request, plan_scheme.name))
    earlier = files.earlier or {}
    clips = open_clips(request.clip, plan_scheme)
    device = ranks.device(choose_device(request.device, request.threads or earlier.get("threads")))
    checkpoint = load_checkpoint(model_file, device)
    given = stack.enter_context(
        given_frames(
            request.clip, clips, plan_scheme, request.length, checkpoint.config.model, files.paths[0].parent, output
        )
    )
    plan = planning.make(
        plan_scheme,
        length=given.length,
        window=request.window or checkpoint.config.model.window,
        step=request.step,
        given=given.spans,
    )
    clip_length = checkpoint.clip_length
    warn_of_reach(plan, clip_length, output)
    warn_of_blind(plan, output)
    warn_of_window(plan, checkpoint.config.model.window, output)
    guidance = options.guidance_weight(request.guidance, request.checkpoint)
    sampling = batch.Sampling.of(
        request.sampler, request.sampling_steps, guidance, checkpoint.process.timesteps, request.eta
    )
    budget = memory_report.sampling_budget(request.memory_budget, checkpoint, device)
    widest = plan.widest * request.num_samples
    asked = request.max_batch or earlier.get("max_batch")
    # What is free differs from process to process; how the work is divided into batches must not.
    max_batch = ranks.smallest(
        memory_report.sampling_batch(
            checkpoint,
            asked,
            widest,
            plan,
            budget,
            device,
            output,
            resumed=request.max_batch is None,
            remark=not request.dry_run,
        )
    )
    calls = rollout.count_calls(plan, sampling, request.num_samples, max_batch, ranks)
    fps = request.fps or given.fps or DEFAULT_FPS
    films = _films(request, files, plan, checkpoint.config.model.image_size, fps)
    if request.dry_run:
        memory = memory_report.sampling_plan(checkpoint, min(widest, max_batch), plan, budget, device)
        seconds = calls * batch.seconds_per_call(checkpoint, plan, request.num_samples, max_batch, guidance)
        would_be = _what_would_be(plan, clip_length, sampling, calls, seconds, memory, request, files)
        return None if ranks.rank else would_be
    choose = None
    if plan_scheme.adaptive:
        embedding = diversity.make_embedding(request.embedding, device)
        choose = diversity.Diversity(plan, embedding, request.num_samples).choose
    seed = request.seed if request.seed is not None else earlier.get("seed")
    seed = ranks.share(lambda: secrets.randbits(31)) if seed is None else seed
    report: dict[str, Any] = {
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
        "sampling_steps": len(sampling.timesteps),
        "eta": request.eta,
        "guidance": guidance,
        "embedding": request.embedding if choose else None,
        "compile": request.compile,
        "network_calls": calls,
        "max_batch": max_batch,
        "checkpoint": str(model_file),
        "checkpoint_sha256": checkpoint.sha256,
        "plan_sha256": rollout.digest(plan),
        "fdm": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processes": ranks.size,
    }
    if request.compile:
        compiled.compile_blocks(checkpoint.model)
        stack.enter_context(compiled.explained("leave out --compile"))
    if request.resume and files.earlier is None:
        output.note("no run was interrupted here: starting one")
    began = time.monotonic()
    if ranks.rank == 0:
        facts = {name: report[name] for name in _DECISIVE if name in report}
        stack.enter_context(files.work.opened(facts, request.resume, str(model_file)))
        files.check()  # another run may have chosen the same names, and be done by now
        if files.force:
            files.let_replace()
    output.note(
        f"{plural(plan.length, 'frame')} with {plan.scheme}: {plural(plan.calls, 'window')} in "
        f"{plural(plan.waves, 'wave')}, {plural(calls, 'network call')} "
        f"({_how(request, sampling)}), seed {seed}"
    )
    updates = stack.enter_context(
        contextlib.closing(
            rollout.run(
                checkpoint,
                plan,
                sampling,
                seed=seed,
                samples=request.num_samples,
                given=given.frames(plan),
                max_batch=max_batch,
                choose=choose,
                work=None if ranks.rank else files.work,
                scratch=files.paths[0].parent,
                ranks=ranks,
            )
        )
    )
    if ranks.rank:
        for _ in updates:
            pass
        return None
    chosen = _write(updates, films, plan, calls, len(sampling.timesteps), fps, files, request, output)
    (report["height"], report["width"]), report["fps"] = films.size, films.fps
    seconds = time.monotonic() - began
    report["seconds"] = round(seconds, 3)
    reports = [{"output": str(path), **report} for path in files.paths]
    if request.grid and choose:
        reports[0]["chosen"] = chosen  # `stages` are the first sample's
    for sample, own in enumerate(reports):
        write_report(beside(files.paths[sample], ".json"), own, _executed(plan, chosen[sample]))
    output.note(f"done in {duration(seconds)}")
    for sheet in files.sheets:
        output.note(f"contact sheet: {sheet}")
    paths, sheets = (list(map(str, names)) for names in (files.paths, files.sheets))
    return dict(reports[0], outputs=paths, sheets=sheets), "\n".join(paths)


def _outputs(request: Request, scheme_name: str) -> Outputs:
    stem = f"sample-{scheme_name}".replace("/", "-").replace(os.sep, "-")
    if request.clip:
        path = request.clip.path
        stem = f"{(path if path.name else path.resolve()).stem}-extended"  # of the folder `.`, too
    count = 1 if request.grid else request.num_samples
    return Outputs.of(request.output, stem, count, sheet=request.sheet, force=request.force, resume=request.resume)


def _films(request: Request, files: Outputs, plan: Plan, side: int, fps: float) -> Films:
    """The files as they will be; what their formats cannot hold is refused here, what exists by `files.check`."""
    from fdm_cli.films import Films

    return Films(
        files.paths,
        fps,
        shape=(plan.length, side, side),
        samples=request.num_samples,
        grid=request.grid,
        scale=request.scale,
        sheets=files.sheets,
        folder=files.work.path,
    )


def _how(request: Request, sampling: Sampling) -> str:
    guided = f", guidance {sampling.guidance:g}" if sampling.guidance != 1 else ""
    return f"{request.sampler}, {plural(len(sampling.timesteps), 'step')} a window{guided}"


def _executed(plan: Plan, chosen: dict[int, tuple[int, ...]]) -> Iterator[Stage]:
    """The stages as they were run: with the observed frames that were chosen at run time."""
    for number, stage in enumerate(plan.stages):
        yield replace(stage, observed=chosen[number]) if number in chosen else stage


def _what_would_be(
    plan: Plan,
    clip_length: int,
    sampling: Sampling,
    calls: int,
    seconds: float,
    memory: tuple[dict[str, Any] | None, str],
    request: Request,
    files: Outputs,
) -> tuple[dict[str, Any], str]:
    facts = {
        **as_data(plan, with_stages=False),
        "num_samples": request.num_samples,
        "sampler": request.sampler,
        "sampling_steps": len(sampling.timesteps),
        "guidance": sampling.guidance,
        "network_calls": calls,
        "outputs": list(map(str, files.paths)),
        "clip_length": clip_length,
        "estimated_seconds": round(seconds, 1),
        "memory": memory[0],
    }
    text = (
        f"{plural(plan.length, 'frame')} with {plan.scheme} (window {plan.window}, step {plan.step}): "
        f"{plural(plan.calls, 'window')} in {plural(plan.waves, 'wave')}\n"
        f"{plural(calls, 'network call')} ({_how(request, sampling)}), "
        f"about {duration(seconds)}\nreaches {plural(plan.reach, 'frame')}; "
        f"the model was trained on clips of {clip_length}, which reach {clip_length - 1}\n{memory[1]}"
    )
    return facts, text


def _write(
    updates: Iterator[Update],
    films: Films,
    plan: Plan,
    calls: int,
    steps: int,
    fps: float,
    files: Outputs,
    request: Request,
    output: Output,
) -> Sequence[dict[int, tuple[int, ...]]]:
    """Writes frames while they are made; no half-written video is left behind when it does not end well.

    Returns:
        for each sample, by stage, the observed frames that were chosen at run time.

    Raises:
        Interrupted: by a signal; the next one stops at once.
    """
    from fdm_cli import video
    from fdm_cli.signals import StopSignals

    windows = plan.calls * request.num_samples
    chosen: list[dict[int, tuple[int, ...]]] = [{} for _ in range(request.num_samples)]
    made = 0
    with StopSignals() as stop, films, output.progress(calls, "network calls", steps="steps") as progress:
        began = time.monotonic()
        for update in updates:
            for job in update.executed:
                made += len(job.stage.latent)
                if job.stage.choice is not None:
                    chosen[job.sample][job.number] = job.observed
            if update.replayed:
                made, began = 0, time.monotonic()
                progress.skip(update.network_calls)
            pace = made / max(time.monotonic() - began, 1e-9)
            progress.update(
                update.network_calls,
                f"window {update.windows} of {windows}",
                f"{pace:.3g} frames/s",
                (update.steps, steps),
            )
            for frame in update.frames:
                films.write(video.to_uint8(frame))
            if stop.received is not None:
                kept = None if update.replayed else f"{update.windows} of {windows} windows are"
                raise _interrupted(stop.received, kept, files)
        try:
            files.check()
        except BadInput as error:  # something has appeared meanwhile
            raise RunFailed(error.message, "the frames are kept: --resume goes on when it is gone") from None
        files.let_replace()  # from here on what exists can be this run's own
    for remark in films.remarks:
        output.note(remark)
    if abs(films.fps / fps - 1) > 0.005:
        ticks = f"{files.paths[0].suffix} counts in whole ticks"
        output.note(f"{fps:.4g} frames per second became {films.fps:.4g}: {ticks}")
    return chosen


def _interrupted(signal: int, kept: str | None, files: Outputs) -> Interrupted:
    if not files.work.worthwhile:
        return Interrupted(signal, "interrupted before the first window was finished")
    return Interrupted(
        signal,
        f"interrupted; {kept or 'what was made before is'} kept in {files.work.path}",
        "the same command with --resume goes on",
    )
