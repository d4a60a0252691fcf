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
from fdm_cli.cli.clip import ClipRequest, Given, given_frames, open_clips
from fdm_cli.cli.outputs import Outputs, beside, write_report
from fdm_cli.cli.plan_report import as_data, sizes, warn_of_blind, warn_of_reach, warn_of_window
from fdm_cli.cli.render import Output, duration, plural
from fdm_cli.errors import BadInput, Interrupted, RunFailed

if TYPE_CHECKING:
    import torch

    from fdm_cli.batch import Sampling
    from fdm_cli.budget import Budget
    from fdm_cli.checkpoint import Checkpoint
    from fdm_cli.distributed import Ranks
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
    timestep_shift: float | None
    guidance: float
    guidance_rescale: float
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
    begin: int | None = None
    clip: ClipRequest | None = None


# What decides the frames, of what the report says: a run is resumed only where all of it is the same.
_DECISIVE = (
    "checkpoint_sha256", "scheme", "frames", "window", "step", "begin", "given", "input_sha256", "num_samples", "seed",
    "sampler", "sampling_steps", "eta", "timestep_shift", "guidance", "guidance_rescale", "embedding", "compile",
    "max_batch", "processes", "device", "threads", "fdm", "torch", "plan_sha256",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is settled before the first frame is made.

    Attributes:
        request: the options.
        output: where words go.
        ranks: the processes that share the work.
        files: of the result.
        model_file: the checkpoint's file.
        checkpoint: the model, on its device.
        device: where it computes.
        given: the clip's frames, or none.
        adaptive: whether the scheme chooses observed frames at run time.
        plan: the windows.
        sampling: how each is sampled.
        budget: the memory that a network call may take.
        max_batch: windows in one.
        calls: network calls in all.
        fps: frames a second that were asked for.
        films: the files that frames go to.
    """

    request: Request
    output: Output
    ranks: Ranks
    files: Outputs
    model_file: Path
    checkpoint: Checkpoint
    device: torch.device
    given: Given
    adaptive: bool
    plan: Plan
    sampling: Sampling
    budget: Budget | None
    max_batch: int
    calls: int
    fps: float
    films: Films

    @property
    def widest(self) -> int:
        """Windows that could be in one network call."""
        return self.plan.widest * self.request.num_samples


def make_videos(request: Request, output: Output) -> None:
    """Plans, samples, writes, reports. Whatever can be refused is refused before any work is done."""
    from fdm_cli.distributed import joined

    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(joined())
        job = _settle(request, output, ranks, stack)
        result = _what_would_be(job) if request.dry_run else _run(job, stack)
    if ranks.rank == 0:  # shown when nothing is left to be put away: stdout may be broken
        output.result(*result)


def _settle(request: Request, output: Output, ranks: Ranks, stack: contextlib.ExitStack) -> _Job:
    """Everything that can be refused; the clip stays open as long as the stack."""
    plan_scheme = scheme.load(request.scheme)

    from fdm_cli import batch, diversity, rollout, samplers
    from fdm_cli import plan as planning
    from fdm_cli.checkpoint import load_checkpoint
    from fdm_cli.device import choose_device
    from fdm_cli.video_info import DEFAULT_FPS

    samplers.make(request.sampler, request.eta)  # a misspelt name is said before the model is read
    diversity.check_embedding(request.embedding)
    if ranks.rank:
        output = Output(mute=True)
    if request.embedding != diversity.EMBEDDINGS[0] and not plan_scheme.adaptive:
        output.warn(f"--embedding is for schemes that choose by how different frames look; {plan_scheme.name} does not")
    model_file = options.model_file(request.checkpoint, output)
    files = ranks.share(lambda: _outputs(request, plan_scheme.name))
    earlier = files.earlier or {}
    clips = open_clips(request.clip, plan_scheme)
    device = ranks.device(choose_device(request.device, request.threads or earlier.get("threads"), exact=True))
    checkpoint = load_checkpoint(model_file, device)
    model = checkpoint.config.model
    given = stack.enter_context(
        given_frames(request.clip, clips, plan_scheme, request.length, model, files.paths[0].parent, output)
    )
    plan = planning.make(
        plan_scheme,
        length=given.length,
        window=request.window or model.window,
        step=request.step,
        begin=request.begin,
        given=given.spans,
    )
    given.warn_of_pixels(checkpoint.config.diffusion, output)
    warn_of_reach(plan, checkpoint.clip_length, output)
    warn_of_blind(plan, output)
    warn_of_window(plan, model.window, output)
    sampling = batch.Sampling.of(
        request.sampler,
        request.sampling_steps,
        request.guidance,
        checkpoint.process.timesteps,
        request.eta,
        options.spacing(request.timestep_shift, request.checkpoint, request.sampler),
        request.guidance_rescale,
    )
    budget = memory_report.sampling_budget(request.memory_budget, checkpoint, device)
    # What is free differs from process to process; how the work is divided into batches must not.
    max_batch = ranks.smallest(
        memory_report.sampling_batch(
            checkpoint,
            request.max_batch or earlier.get("max_batch"),
            plan.widest * request.num_samples,
            plan,
            budget,
            device,
            output,
            resumed=request.max_batch is None,
            remark=not request.dry_run,
        )
    )
    fps = request.fps or given.fps or DEFAULT_FPS
    return _Job(
        request=request,
        output=output,
        ranks=ranks,
        files=files,
        model_file=model_file,
        checkpoint=checkpoint,
        device=device,
        given=given,
        adaptive=plan_scheme.adaptive,
        plan=plan,
        sampling=sampling,
        budget=budget,
        max_batch=max_batch,
        calls=rollout.count_calls(plan, sampling, request.num_samples, max_batch, ranks),
        fps=fps,
        films=_films(request, files, plan, model.image_size, fps),
    )


def _run(job: _Job, stack: contextlib.ExitStack) -> tuple[dict[str, Any], str]:
    """Makes the videos: the result as JSON and as text, of use in the first of several processes."""
    from fdm_cli import compiled, diversity, rollout

    request, output, ranks, files, plan = job.request, job.output, job.ranks, job.files, job.plan
    choose = None
    if job.adaptive:
        embedding = diversity.make_embedding(request.embedding, job.device)
        choose = diversity.Diversity(plan, embedding, request.num_samples).choose
    seed = _known_seed(job)
    seed = ranks.share(lambda: secrets.randbits(31)) if seed is None else seed
    report = _report(job, seed)
    if request.compile:
        compiled.compile_blocks(job.checkpoint.model)
        stack.enter_context(compiled.explained("leave out --compile"))
    if request.resume and files.earlier is None:
        output.note("no run was interrupted here: starting one")
    began = time.monotonic()
    if ranks.rank == 0:
        job = _hold(job, {name: report[name] for name in _DECISIVE if name in report}, stack)
        files = job.files
        if files.force:
            files.let_replace()
    output.note(
        f"{plural(plan.length, 'frame')} with {plan.scheme}: {plural(plan.calls, 'window')} in "
        f"{plural(plan.waves, 'wave')}, {plural(job.calls, 'network call')} "
        f"({_how(job)}), seed {seed}"
    )
    updates = stack.enter_context(
        contextlib.closing(
            rollout.run(
                job.checkpoint,
                plan,
                job.sampling,
                seed=seed,
                samples=request.num_samples,
                given=job.given.frames(plan),
                max_batch=job.max_batch,
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
        return report, ""
    chosen = _write(updates, job)
    (report["height"], report["width"]), report["fps"] = job.films.size, job.films.fps
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


def _hold(job: _Job, facts: dict[str, Any], stack: contextlib.ExitStack) -> _Job:
    """The job, its outputs held for this process as long as the stack; under other names if those chosen are taken."""
    side = job.checkpoint.config.model.image_size
    while True:
        files = job.files
        try:
            with contextlib.ExitStack() as attempt:
                attempt.enter_context(files.work.opened(facts, job.request.resume, str(job.model_file)))
                files.check()  # another run may have chosen the same names, and be done by now
                stack.push(attempt.pop_all())
                return job
        except BadInput:
            again = None if job.request.output or files.earlier else _outputs(job.request, job.plan.scheme)
            if again is None or again.paths == files.paths:
                raise
            job = replace(job, files=again, films=_films(job.request, again, job.plan, side, job.fps))


def _report(job: _Job, seed: int) -> dict[str, Any]:
    """How the videos are made; sizes, rate and time are known when the files are written."""
    import torch

    from fdm_cli import rollout

    request, plan = job.request, job.plan
    return {
        "frames": plan.length,
        "width": 0,
        "height": 0,
        "fps": job.fps,
        "seed": seed,
        "scheme": plan.scheme,
        "window": plan.window,
        "step": plan.step,
        "begin": plan.begin,
        "given": [list(span) for span in plan.given],
        **job.given.facts,
        "num_samples": request.num_samples,
        "scale": request.scale,
        "grid": request.grid,
        **_settings(job),
        "compile": request.compile,
        "max_batch": job.max_batch,
        "checkpoint": str(job.model_file),
        "checkpoint_sha256": job.checkpoint.sha256,
        "plan_sha256": rollout.digest(plan),
        "fdm": __version__,
        "torch": torch.__version__,
        "device": job.device.type,
        "threads": torch.get_num_threads(),
        "processes": job.ranks.size,
    }


def _known_seed(job: _Job) -> int | None:
    """The user's, or that of the run that is resumed."""
    return job.request.seed if job.request.seed is not None else (job.files.earlier or {}).get("seed")


def _settings(job: _Job) -> dict[str, Any]:
    """How the frames of a window are made."""
    request, sampling = job.request, job.sampling
    return {
        "sampler": request.sampler,
        "sampling_steps": len(sampling.timesteps),
        "eta": request.eta,
        "timestep_shift": sampling.shift,
        "guidance": sampling.guidance,
        "guidance_rescale": sampling.rescale,
        "embedding": request.embedding if job.adaptive else None,
        "network_calls": job.calls,
    }


def _outputs(request: Request, scheme_name: str) -> Outputs:
    stem = f"sample-{scheme_name}".replace("/", "-").replace(os.sep, "-")
    if request.clip:
        path = request.clip.path
        named = path if path.name not in ("", "..") else path.resolve()  # `.` has no name
        stem = f"{named.stem or 'clip'}-extended"
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


def _how(job: _Job) -> str:
    sampling = job.sampling
    return f"{job.request.sampler}, {plural(len(sampling.timesteps), 'step')} a window{options.departures(sampling)}"


def _executed(plan: Plan, chosen: dict[int, tuple[int, ...]]) -> Iterator[Stage]:
    """The stages as they were run: with the observed frames that were chosen at run time."""
    for number, stage in enumerate(plan.stages):
        yield replace(stage, observed=chosen[number]) if number in chosen else stage


def _what_would_be(job: _Job) -> tuple[dict[str, Any], str]:
    """For `--dry-run`: as `_run`."""
    from fdm_cli import batch, rollout

    plan, sampling, samples, clip_length = job.plan, job.sampling, job.request.num_samples, job.checkpoint.clip_length
    memory, memory_text = memory_report.sampling_plan(
        job.checkpoint, min(job.widest, job.max_batch), plan, job.budget, job.device
    )
    seconds = rollout.frames_computed(plan, sampling, samples, job.max_batch, job.ranks) * batch.seconds_per_frame(
        job.checkpoint, plan, samples, job.max_batch, sampling.guidance
    )
    facts = {
        **as_data(plan, with_stages=False),
        "num_samples": samples,
        "seed": _known_seed(job),  # null: drawn when the video is made
        **_settings(job),
        "outputs": list(map(str, job.files.paths)),
        "clip_length": clip_length,
        "estimated_seconds": round(seconds, 1),
        "memory": memory,
    }
    text = (
        f"{plural(plan.length, 'frame')} with {plan.scheme} ({sizes(plan)}): "
        f"{plural(plan.calls, 'window')} in {plural(plan.waves, 'wave')}\n"
        f"{plural(job.calls, 'network call')} ({_how(job)}), "
        f"about {duration(seconds)}\nreaches {plural(plan.reach, 'frame')}; "
        f"the model was trained on clips of {clip_length}, which reach {clip_length - 1}\n{memory_text}"
    )
    return facts, text


def _write(updates: Iterator[Update], job: _Job) -> Sequence[dict[int, tuple[int, ...]]]:
    """Writes frames while they are made; no half-written video is left behind when it does not end well.

    Returns:
        for each sample, by stage, the observed frames that were chosen at run time.

    Raises:
        Interrupted: by a signal; the next one stops at once.
    """
    from fdm_cli import video
    from fdm_cli.signals import StopSignals

    output, files, films = job.output, job.files, job.films
    windows = job.plan.calls * job.request.num_samples
    steps = len(job.sampling.timesteps)
    chosen: list[dict[int, tuple[int, ...]]] = [{} for _ in range(job.request.num_samples)]
    made = 0
    with StopSignals() as stop, films, output.progress(job.calls, "network calls", steps="steps") as progress:
        began = time.monotonic()
        for update in updates:
            for window in update.executed:
                made += len(window.stage.latent)
                if window.stage.choice is not None:
                    chosen[window.sample][window.number] = window.observed
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
    if abs(films.fps / job.fps - 1) > 0.005:
        kind = files.paths[0].suffix
        why = f"{kind} counts in whole ticks"
        if films.fps < job.fps / 1.5:
            why = f"faster {kind} files are played slowly; .mp4 and .webp keep the rate"
        output.note(f"{job.fps:.4g} frames per second became {films.fps:.4g}: {why}")
    return chosen


def _interrupted(signal: int, kept: str | None, files: Outputs) -> Interrupted:
    if not files.work.worthwhile:
        return Interrupted(signal, "interrupted before the first window was finished")
    return Interrupted(
        signal,
        f"interrupted; {kept or 'what was made before is'} kept in {files.work.path}",
        "the same command with --resume goes on",
    )
