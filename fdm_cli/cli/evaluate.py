"""`fdm evaluate`: how good a model is, on clips that training never saw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fdm_cli import scheme as schemes
from fdm_cli.cli import evaluation_report as report
from fdm_cli.cli import measuring, memory_report, options
from fdm_cli.cli.render import Output, plural
from fdm_cli.errors import BadInput, did_you_mean, one_line

if TYPE_CHECKING:
    from fdm_cli.config import Config
    from fdm_cli.dataset import Clips

PARTS = ("prediction", "bound", "drift")
# Options that say nothing where these parts are left out.
NEEDS = {
    "clips": ("prediction", "bound"),
    "given": ("prediction", "bound"),
    "futures": ("prediction",),
    "bound_timesteps": ("bound",),
    "scheme": ("drift",),
    "length": ("drift",),
    "step": ("drift",),
    "begin": ("drift",),
    "rollouts": ("drift",),
    "fvd_weights": ("drift",),
    "embedding": ("drift",),
    "sampler": ("prediction", "drift"),
    "sampling_steps": ("prediction", "drift"),
    "eta": ("prediction", "drift"),
    "timestep_shift": ("prediction", "drift"),
    "guidance": ("prediction", "drift"),
    "guidance_rescale": ("prediction", "drift"),
}


def evaluate(
    context: typer.Context,
    checkpoint: options.Checkpoint = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help="Whose held-out clips; default: what the model was trained on."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="PARTS", help="Of prediction, bound and drift, with commas; default: all."),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme", metavar="NAME|FILE", help="Of long rollouts; may be repeated; default: autoregressive."
        ),
    ] = None,
    clips: Annotated[
        int, typer.Option("--clips", metavar="N", min=1, max=10_000, help="Clips for prediction and bound.")
    ] = 256,
    given: Annotated[
        int | None,
        typer.Option(
            "--given",
            metavar="G",
            min=1,
            max=options.MAX_WINDOW,
            help="Frames that a prediction starts from; default: half a window, 8 at most.",
        ),
    ] = None,
    futures: Annotated[
        int, typer.Option("--futures", metavar="N", min=1, max=1000, help="Predictions of each clip.")
    ] = 1,
    bound_timesteps: Annotated[
        int | None,
        typer.Option(
            "--bound-timesteps",
            metavar="N",
            min=2,
            max=100_000,
            help="Timesteps that the bound sums over; default: 25, or all where there are fewer.",
        ),
    ] = None,
    length: Annotated[
        int, typer.Option("--length", metavar="N", min=1, max=100_000, help="Frames of a rollout.")
    ] = 160,
    step: options.Step = None,
    begin: options.Begin = None,
    rollouts: Annotated[
        int, typer.Option("--rollouts", metavar="N", min=1, max=10_000, help="Rollouts of each scheme.")
    ] = 8,
    fvd_weights: Annotated[
        Path | None,
        typer.Option(
            "--fvd-weights", metavar="FILE", help="TorchScript I3D, for the Frechet video distance; it is executed."
        ),
    ] = None,
    sampler: options.Sampler = options.DEFAULT_SAMPLER,
    sampling_steps: options.SamplingSteps = None,
    eta: options.Eta = 0.0,
    timestep_shift: options.TimestepShift = None,
    guidance: options.Guidance = 1.0,
    guidance_rescale: options.GuidanceRescale = 0.0,
    max_batch: options.MaxBatch = None,
    embedding: options.Embedding = "pixels",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw the figures, as a PNG file.")
    ] = None,
    force: options.Force = False,
    memory_budget: options.MemoryBudget = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Of the noise; clips are always the same.")
    ] = 0,
    device: options.Device = options.DeviceName.auto,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    _debug: options.Debug = False,
) -> None:
    """Measure a model on held-out clips: prediction, variational bound, drift.

    Prediction is the rest of a window from its first frames, beside two baselines. The bound is in bits per dimension.
    Drift is how the frames of long rollouts change, against real clips.
    """
    output = Output(json, quiet)
    parts = _parts(only)
    loaded = [schemes.load(name) for name in scheme or ["autoregressive"]]
    for name, needed in NEEDS.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and not set(needed) & set(parts):
            output.warn(f"--{name.replace('_', '-')} is for {' and '.join(needed)}, which --only leaves out")
    names = [one.name for one in loaded]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"--scheme: there are two of the name {twice}")
    if plot is not None:
        options.check_plot(plot, force)
        if parts == ("bound",):
            raise BadInput("--plot draws prediction and drift, --only leaves out both")
    model_file = options.model_file(checkpoint, output)
    shift = options.spacing(timestep_shift, checkpoint, sampler)
    rescale = 0.0 if parts == ("bound",) else guidance_rescale

    from fdm_cli import diversity, samplers
    from fdm_cli import evaluate as evaluation
    from fdm_cli.batch import Sampling
    from fdm_cli.checkpoint import load_checkpoint
    from fdm_cli.device import choose_device
    from fdm_cli.distributed import joined
    from fdm_cli.files import finite
    from fdm_cli.frechet import VideoFeatures

    # Whatever can be refused is refused before anything is measured.
    if data == "":
        raise BadInput("--data: the name is empty", "without it, the data that the model was trained on")
    with joined() as ranks:
        if ranks.size > 1:
            raise BadInput(f"fdm evaluate is one process, torchrun started {ranks.size}", "start it without torchrun")
    samplers.make(sampler, eta)
    diversity.check_embedding(embedding)
    where = choose_device(device.value, threads, exact=True)
    model = load_checkpoint(model_file, where)
    network = VideoFeatures(fvd_weights, where) if fvd_weights else None
    window = model.config.model.window
    given = given or max(1, min(8, window // 2))
    if parts != ("drift",):
        plan = evaluation.prediction_plan(window, given)
    bound_at = measuring.choose_bound_timesteps(model, bound_timesteps) if "bound" in parts else []
    held_out = _open(model.config, data, output)
    if parts != ("drift",):
        evaluation.check_length(held_out, window, "--only drift needs no whole window")
        _warn_of_repeats(held_out.of_length(window), clips, output)
    setting = measuring.Setting(
        checkpoint=model,
        clips=held_out,
        sampling=Sampling.of(sampler, sampling_steps, guidance, model.process.timesteps, eta, shift, rescale),
        seed=seed,
        given=given,
        max_batch=max_batch,
        budget=memory_report.sampling_budget(memory_budget, model, where),
        device=where,
        output=output,
    )
    batch = setting.batch(plan, clips) if parts != ("drift",) else 0
    rolled = (
        measuring.prepare_drift(setting, loaded, length, step, begin, rollouts, embedding, network)
        if "drift" in parts
        else None
    )
    measured_on = data or model.config.data.source
    how = ""
    if parts != ("bound",):  # which samples nothing
        steps = plural(len(setting.sampling.timesteps), "step")
        how = f"{sampler}, {steps}{options.departures(setting.sampling)}, "
    # The bundled model's steps are those of the last of several runs.
    trained = f"{model_file} after {plural(model.step, 'step')}" if checkpoint else "the bundled model"
    output.show(f"{trained}, on held-out clips of {one_line(measured_on)}; {how}seed {seed}")
    prediction = bound = drift = None
    # Each part is shown when it is done: what follows may take long, and be stopped.
    if "prediction" in parts:
        prediction = measuring.predict(setting, clips, futures, batch)
        output.show("\n".join(["", *report.prediction_lines(prediction, given, clips, futures)]))
    if "bound" in parts:
        bound = measuring.bound(setting, clips, bound_at, min(batch, clips))
        output.show("\n".join(["", *report.bound_lines(bound, given, clips)]))
    if rolled is not None:
        drift = measuring.drift(setting, rolled)
        output.show("\n".join(["", *drift.lines()]))
    sampled = {
        "sampler": sampler,
        "sampling_steps": len(setting.sampling.timesteps),
        "eta": eta,
        "timestep_shift": shift,
        "guidance": guidance,
        "guidance_rescale": rescale,
    }
    facts: dict[str, Any] = {
        "checkpoint": str(model_file),
        "checkpoint_sha256": model.sha256,
        "step": model.step,
        "data": measured_on,
        "window": window,
        "given": given if parts != ("drift",) else None,
        "clips": clips if parts != ("drift",) else None,
        "futures": futures if "prediction" in parts else None,
        "seed": seed,
        **{name: value if parts != ("bound",) else None for name, value in sampled.items()},
        "device": where.type,
        "prediction": finite(dataclasses.asdict(prediction)) if prediction else None,
        "bound": finite(dataclasses.asdict(bound)) if bound else None,
        "drift": finite(drift.facts()) if drift else None,
    }
    if json:  # before the picture, which may fail
        output.result(facts, "")
    if plot is not None:
        report.draw(plot, prediction, drift, force)
        output.note(f"wrote {plot}")


def _parts(only: str | None) -> tuple[str, ...]:
    """What `--only` chooses. Raises BadInput."""
    if only is None:
        return PARTS
    chosen = [name.strip() for name in only.split(",")]
    for name in chosen:
        if name not in PARTS:
            raise BadInput(f"--only: unknown part {name!r}", did_you_mean(name, PARTS))
    return tuple(dict.fromkeys(chosen))


def _warn_of_repeats(windows: Clips, count: int, output: Output) -> None:
    """Says when fewer different windows are held out than are to be measured."""
    if windows.places is not None and windows.videos is not None and windows.places < count:
        output.warn(
            f"{plural(windows.videos, 'held-out video')} {'has' if windows.videos == 1 else 'have'} "
            f"{plural(windows.places, 'window')} of {windows.clip_length} frames, "
            f"--clips {count} measures some of them again"
        )


def _open(config: Config, data: str | None, output: Output) -> Clips:
    """The held-out clips, decoded with progress where that has not been done; says so when training saw them too.

    What is not the training's data may be shorter than it: a clip need only fill a window. But where some clips are
    as long as in training only those count, as in training: the data may be the training's by another name, and the
    last tenth of more clips would be another one.
    """
    from fdm_cli import dataset
    from fdm_cli.cli.data_report import prepare

    trained = opened = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source=data or config.data.source)
    )
    if trained != config:
        short = min(config.model.window, config.data.clip_length)
        opened = dataclasses.replace(
            trained, data=dataclasses.replace(trained.data, clip_length=short, first_clip_length=0, growth_steps=0)
        )
    try:
        found = prepare(opened, output)
    except BadInput as error:  # its hint may be an option of `fdm train`
        needed = f"a held-out clip needs {opened.data.clip_length} frames here"
        raise BadInput(error.message, needed if "--set" in (error.hint or "") else error.hint) from None
    if any(video.frames >= trained.data.clip_length for video in found.videos):
        opened = trained
        found = dataset.survey(opened)
    if found.unit == "clips" and len(found.videos) == 1:
        output.warn(f"{opened.data.source} is one clip: nothing is held out, so training may have seen it")
    return dataset.open_clips(opened, "held-out")
