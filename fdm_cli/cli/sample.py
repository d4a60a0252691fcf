"""`fdm sample`: a new video."""

from __future__ import annotations

from fdm_cli.cli import options
from fdm_cli.cli.render import Output
from fdm_cli.cli.sampling import Request, make_videos


def sample(
    checkpoint: options.Checkpoint = None,
    scheme: options.Scheme = "autoregressive",
    length: options.Length = None,
    window: options.Window = None,
    step: options.Step = None,
    begin: options.Begin = None,
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
    """Make a new video of any length, window by window, as the scheme says."""
    request = Request(
        checkpoint=checkpoint,
        scheme=scheme,
        length=length,
        window=window,
        step=step,
        begin=begin,
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
    )
    make_videos(request, Output(json, quiet))
