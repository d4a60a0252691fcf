"""`fdm extend`: the user's own clip goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fdm_cli.cli import options
from fdm_cli.cli.clip import ClipRequest
from fdm_cli.cli.render import Output
from fdm_cli.cli.sampling import Request, make_videos


def extend(
    clip: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            parser=options.clip_path,
            help="gif, mp4, webm, webp, apng, npy, npz and more, or a folder.",
        ),
    ],
    checkpoint: options.Checkpoint = None,
    scheme: options.ExtendScheme = None,
    use_last: options.UseLast = None,
    until: options.Until = None,
    length: options.ExtendLength = None,
    window: options.Window = None,
    step: options.Step = None,
    num_samples: options.NumSamples = 1,
    sampler: options.Sampler = options.DEFAULT_SAMPLER,
    sampling_steps: options.SamplingSteps = None,
    eta: options.Eta = 0.0,
    timestep_shift: options.TimestepShift = None,
    guidance: options.Guidance = 1.0,
    guidance_rescale: options.GuidanceRescale = 0.0,
    max_batch: options.MaxBatch = None,
    embedding: options.Embedding = "pixels",
    output: options.OutputFile = None,
    fps: options.Fps = None,
    scale: options.Scale = 1,
    grid: options.Grid = False,
    sheet: options.Sheet = False,
    force: options.Force = False,
    compile_network: options.Compile = False,
    memory_budget: options.MemoryBudget = None,
    resume: options.ResumeSampling = False,
    dry_run: options.DryRun = False,
    seed: options.Seed = None,
    device: options.Device = options.DeviceName.auto,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    _debug: options.Debug = False,
) -> None:
    """Continue a clip: its own frames stay, the scheme says where new ones go. --length counts them all."""
    scheme = scheme or ("autoregressive" if until is None else "bridge")
    request = Request(
        checkpoint=checkpoint,
        scheme=scheme,
        length=length,
        window=window,
        step=step,
        num_samples=num_samples,
        sampler=sampler,
        sampling_steps=sampling_steps,
        eta=eta,
        timestep_shift=timestep_shift,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        max_batch=max_batch,
        output=output,
        fps=fps,
        scale=scale,
        grid=grid,
        sheet=sheet,
        force=force,
        resume=resume,
        dry_run=dry_run,
        seed=seed,
        device=device.value,
        threads=threads,
        memory_budget=memory_budget,
        embedding=embedding,
        compile=compile_network,
        clip=ClipRequest(clip, use_last, until),
    )
    make_videos(request, Output(json, quiet))
