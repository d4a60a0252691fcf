"""`fdm train`: configuration, run folder, training with progress."""

from __future__ import annotations

import itertools
import json as json_module
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fdm_cli.cli import options
from fdm_cli.cli.render import Output, duration, plural
from fdm_cli.errors import BadInput, RunFailed

if TYPE_CHECKING:
    import torch

    from fdm_cli.checkpoint import Checkpoint
    from fdm_cli.config import Config
    from fdm_cli.dataset import Survey
    from fdm_cli.distributed import Ranks
    from fdm_cli.run_folder import RunFolder
    from fdm_cli.trainer import Trainer

DEFAULT_PRESET = "moving-mnist-small"


class Precision(StrEnum):
    """What activations are computed in; fp16 with a gradient scaler."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass(frozen=True)
class _Start:
    """What `--init-from` names."""

    path: Path
    checkpoint: Checkpoint


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be trained, where and from what."""

    config: Config
    folder: RunFolder
    start: _Start | None
    resume: bool
    device: torch.device
    memory_budget: str | None
    output: Output
    ranks: Ranks


def train(
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Shipped configuration; default {DEFAULT_PRESET}.")
    ] = None,
    list_presets: Annotated[bool, typer.Option("--list-presets", help="List the presets and stop.")] = False,
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Configuration file (YAML).")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; may be repeated.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Folder of videos, one video, IDX digits, or moving-mnist."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a video that cannot be read, instead of leaving it out.")
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            "--run-dir",
            metavar="DIR",
            parser=options.folder_path,
            help="Run folder; default: a new one in runs/.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=1_000_000_000, help="Training steps in all.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", min=1, max=65_536, help="Clips a step.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of activations; default: the configuration's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --run.")] = False,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from",
            metavar="FILE",
            parser=options.checkpoint_path,
            help="Start from a checkpoint's weights; without --preset or --config, with its whole configuration.",
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write what metrics.jsonl gets for TensorBoard.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained and stop.")] = False,
    seed: options.TrainingSeed = None,
    memory_budget: options.MemoryBudget = None,
    device: options.Device = options.DeviceName.auto,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    _debug: options.Debug = False,
) -> None:
    """Train a model. Checkpoints and metrics go to the run folder; Ctrl-C saves and stops."""
    from fdm_cli import config as configuration

    if list_presets:
        names = configuration.preset_names()
        width = max(map(len, names))
        lines = (f"{name:<{width}}  {configuration.preset_about(name)}" for name in names)
        Output(json, quiet).result({"presets": names}, "\n".join(lines))
        return
    if preset is not None and config_file is not None:
        raise BadInput("--preset and --config were both given", "a configuration file says everything a preset says")
    if resume and run is None:
        raise BadInput("--resume needs --run DIR, the folder of the run to go on with")
    if resume and init_from is not None:
        raise BadInput("--resume and --init-from were both given", "a resumed run goes on with its own weights")
    sets = list(overrides or [])
    shortcuts = {
        "data.source": None if data is None else _quoted(data),
        "data.strict": "true" if strict else None,
        "training.steps": steps,
        "training.batch_size": batch_size,
        "training.precision": precision,
        "training.seed": seed,
    }
    sets += [f"{key}={value}" for key, value in shortcuts.items() if value is not None]

    from fdm_cli import distributed
    from fdm_cli.checkpoint import load_checkpoint
    from fdm_cli.device import choose_device
    from fdm_cli.run_folder import RunFolder
    from fdm_cli.trainer import added, other_process, refuse_random, refuse_unfit

    with distributed.joined() as ranks:
        output = Output(json, quiet, mute=ranks.rank > 0)
        start = None if init_from is None else ranks.in_turn(lambda: _Start(init_from, load_checkpoint(init_from)))
        # One process decides, so that all agree on the folder.
        config, path = ranks.share(lambda: _configure(preset, config_file, run, resume, start, sets, output))
        if not resume:
            refuse_random(config, None if start is None else start.checkpoint)
        ranks.clips_each(config.training.batch_size, config.training.accumulation)
        if config.training.weights == "draft" and start is None and not resume:
            output.note("only the draft is trained; the network stays random until another run takes it on from there")
        if start is not None:
            refuse_unfit(start.checkpoint, config, start.path)
            if remark := other_process(start.checkpoint, config):
                output.warn(remark)
            for part in added(start.checkpoint, config):
                output.note(f"model.{part} is new to these weights: it begins with changing nothing")
        job = _Job(
            config=config,
            folder=RunFolder(path),
            start=start,
            resume=resume,
            device=choose_device(device.value, threads),
            memory_budget=memory_budget,
            output=output,
            ranks=ranks,
        )
        if not dry_run:
            _train(job, tensorboard)
        elif ranks.rank == 0:
            _show_plan(job, named_data=data is not None)


def _quoted(text: str) -> str:
    """A text as `--set` takes it; a byte of a file's name that is no text is escaped."""
    quoted = json_module.dumps(text, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", quoted)


def _configure(
    preset: str | None,
    config_file: Path | None,
    run: Path | None,
    resume: bool,
    start: _Start | None,
    sets: list[str],
    output: Output,
) -> tuple[Config, Path]:
    """The run's configuration and its folder."""
    from fdm_cli import config as configuration
    from fdm_cli.files import expanded
    from fdm_cli.run_folder import RunFolder

    if resume and run is not None:
        return _resumed_config(RunFolder(run), preset, config_file, sets, output), run
    if config_file is not None:
        config, name = configuration.load(config_file, sets, output.warn), config_file.stem
    elif start is not None and preset is None:
        trained = start.checkpoint.config
        own = configuration.to_dict(replace(trained, data=trained.data.after(start.checkpoint.step)))
        config, name = configuration.from_dict(own, str(start.path), sets), start.path.stem
    else:
        config, name = configuration.load_preset(preset or DEFAULT_PRESET, sets), preset or DEFAULT_PRESET
    path = run or _new_folder(name)
    if config.data.source != configuration.BUILT_IN and path.resolve() == expanded(config.data.source).resolve():
        raise BadInput(f"--run and --data are one folder, {path}", "what a run writes would become its data")
    RunFolder(path).refuse_run()
    RunFolder(path).refuse_foreign()
    return config, path


def _new_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2 and so on when that is taken."""
    folders = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def _resumed_config(
    folder: RunFolder, preset: str | None, file: Path | None, sets: list[str], output: Output
) -> Config:
    """The run's own configuration; what the command line says must agree with it, but for what MAY_CHANGE."""
    from fdm_cli import config as configuration
    from fdm_cli.trainer import MAY_CHANGE

    free = [text for text in sets if text.partition("=")[0].strip() in MAY_CHANGE]
    config = _own_config(folder, free)
    if preset or file or len(free) < len(sets):
        if file is not None:
            asked = configuration.load(file, sets)
        elif preset is not None:
            asked = configuration.load_preset(preset, sets)
        else:
            asked = _own_config(folder, sets)
        for name, own, other in configuration.differences(config, asked):
            if name in MAY_CHANGE and file is not None:
                output.warn(f"{folder.path} keeps its {name}, {own}: {file} says {other}, which takes --set")
            if name not in MAY_CHANGE:
                hint = "a resumed run may change its --steps, --data and --precision, how its work is split and saved, "
                hint += "nothing else; --init-from starts another run from its weights"
                if preset is not None:
                    hint = f"without --preset it goes on as it was begun; {hint}"
                raise BadInput(f"{folder.path} was started with another {name}", hint)
    return config


def _own_config(folder: RunFolder, sets: list[str]) -> Config:
    """What the run folder says; where it says nothing yet, its newest checkpoint."""
    from fdm_cli import config as configuration

    if folder.config.exists():
        return configuration.load(folder.config, sets)
    state, _ = folder.newest_state()
    if state is None:
        raise BadInput(f"no run to resume in {folder.path}", "leave --resume out to start one")
    return configuration.from_dict(state["config"], str(folder.path), sets)


def _show_plan(job: _Job, *, named_data: bool) -> None:
    import torch

    from fdm_cli import config as configuration
    from fdm_cli.cli import data_report, memory_report
    from fdm_cli.unet import UNet

    config, output, path = job.config, job.output, job.folder.path
    memory, memory_lines = memory_report.training_plan(config, job.device, job.memory_budget, job.ranks.size)
    found = data_report.prepare(config, output)
    if job.start is None and not job.resume:
        data_report.warn_of_pixels(found, config, output)
    sheet = None
    if named_data or config.data.source != configuration.BUILT_IN:
        try:
            sheet = data_report.draw_sheet(config)
        except (BadInput, RunFailed) as error:  # the current folder may be read-only, which says nothing of the run
            output.warn(f"no sheet of training windows: {error.message}")
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in UNet(config).parameters())
    output.result(
        {
            "run": str(path),
            "config": configuration.to_dict(config),
            "parameters": parameters,
            "data": {**found.to_dict(), "sheet": None if sheet is None else str(sheet)},
            "memory": memory,
        },
        f"{configuration.to_yaml(config)}# {parameters / 1e6:.2f} M parameters, run folder {path}\n"
        + "\n".join(f"# {line}" for line in [*data_report.lines(found, config, sheet), *memory_lines]),
    )


def _train(job: _Job, tensorboard: bool) -> None:
    from fdm_cli.cli import data_report, memory_report
    from fdm_cli.device import check_precision, emulates
    from fdm_cli.tensorboard import TensorBoard

    if tensorboard:
        TensorBoard.check()
    config, folder, start, output, ranks = job.config, job.folder, job.start, job.output, job.ranks
    device = ranks.device(job.device)
    precision = config.training.precision
    check_precision(precision, device)
    if device.type == "mps" and config.training.activation_checkpointing and config.model.dropout:
        # PyTorch does not restore the state of this device's random numbers.
        raise BadInput("on mps, activation checkpointing would draw another dropout", "--set model.dropout=0")
    if emulates(precision, device):
        output.warn(f"this processor computes {precision} in software, several times slower than --precision fp32")
    # The folder is held before hours of decoding begin, for which another run would otherwise wait first.
    with folder.locked() if ranks.rank == 0 else nullcontext():
        if not job.resume:  # one may have begun meanwhile
            ranks.share(folder.refuse_run)
        memory = memory_report.check_training(config, device, job.memory_budget, output, ranks.size, resumed=job.resume)
        try:
            found = ranks.in_turn(lambda: data_report.prepare(config, output))
        except BadInput as error:  # its hint may be another setting
            if not job.resume or "--set" not in (error.hint or ""):
                raise
            raise BadInput(error.message, "a run goes on with the same data; --init-from trains on others") from None
        data_report.name_left_out(found, config, output)
        if start is None and not folder.checkpoints():
            data_report.warn_of_pixels(found, config, output)
        _run(job, device, found, memory, tensorboard)


def _run(job: _Job, device: torch.device, found: Survey, memory: str | None, tensorboard: bool) -> None:
    """The training itself; the folder is locked, the data is there."""
    import math
    import time

    from fdm_cli import trainer as training
    from fdm_cli.dataset import open_clips
    from fdm_cli.own_frames import OwnFrames
    from fdm_cli.run_folder import SmoothLoss
    from fdm_cli.signals import StopSignals
    from fdm_cli.tensorboard import TensorBoard

    config, folder, start, output, ranks = job.config, job.folder, job.start, job.output, job.ranks
    clips, held_out = open_clips(config), open_clips(config, "held-out")
    own = OwnFrames(folder.own, config, clips) if config.training.own_share else None
    with StopSignals() as stop:
        state, remarks = ranks.share(folder.newest_state)
        for remark in remarks:
            output.warn(remark)
        trainer = training.Trainer(config, clips, device, held_out, ranks)
        resumed = state is not None
        if state is not None:
            for remark in trainer.load(state):
                output.warn(remark)
            state = None  # gives its memory back
            if trainer.step > config.training.steps:
                raise BadInput(
                    f"{folder.path} is at step {trainer.step} already, beyond {config.training.steps}",
                    "--steps counts all of a run's steps, those that are done too",
                )
        elif start is not None:
            trainer.start_from(start.checkpoint)
            start.checkpoint.model.to("meta")  # gives its memory back
        if ranks.rank == 0:
            _open_run(folder, trainer, found, resumed, start is not None)
        total = config.training.steps
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        if trainer.step < total:
            output.note(_what_and_where(trainer, parameters, folder))
        else:
            output.note(f"{folder.path} is at step {trainer.step} already; a larger --steps goes on")
        if memory:
            output.note(memory)
        if own is not None and trainer.step < total:
            with output.progress(config.training.own_clips, "clips") as progress:
                for finished in training.make_own(trainer, own, stop):
                    progress.update(finished, "drawn by the weights to start from")
        began, first_step = time.monotonic(), trainer.step
        loss, smooth = None, SmoothLoss()
        with (
            (
                TensorBoard(folder.path / "tensorboard", trainer.step)
                if tensorboard and ranks.rank == 0
                else nullcontext()
            ) as board,
            output.progress(total, "steps", trainer.step) as progress,
        ):
            for stats in training.train(trainer, folder, stop):
                if math.isfinite(stats.loss):
                    loss = smooth.add(stats.loss)
                progress.update(stats.step, "no finite loss yet" if loss is None else f"loss {loss:.4f}")
                if stats.held_out is not None:
                    quarters = " ".join(f"{value:.4f}" for value in stats.held_out.quartiles)
                    output.note(f"step {stats.step}: held-out loss {stats.held_out.loss:.4f} (by noise: {quarters})")
                if stats.no_picture is not None:
                    output.warn(f"step {stats.step}: no picture: {stats.no_picture}")
                if stats.preview is not None:
                    output.note(f"step {stats.step}: preview in {stats.preview}")
                if board is not None:
                    board.add(stats)
        checkpoint = ranks.share(lambda: folder.checkpoints()[-1])
        seconds = time.monotonic() - began
    if trainer.step > first_step:
        output.note(f"{plural(trainer.step - first_step, 'step')} done in {duration(seconds)}")
    output.result(
        {
            "run": str(folder.path),
            "checkpoint": str(checkpoint),
            "step": trainer.step,
            "loss": loss,
            "parameters": parameters,
            "seed": config.training.seed,
            "seconds": round(seconds, 3),
        },
        str(checkpoint),
    )


def _open_run(folder: RunFolder, trainer: Trainer, found: Survey, resumed: bool, from_weights: bool) -> None:
    """Brings the folder into the state that the trainer is in."""
    from fdm_cli.cli import data_report

    about = data_report.about(found)
    if resumed:
        folder.check_data(found.fingerprint, about)
        folder.set_aside_after(trainer.step)
    folder.clean()
    folder.forget_metrics_after(trainer.step)
    if from_weights:
        # Before there is a configuration to resume with: a run killed here must not be resumed from random weights.
        folder.save(trainer.state(), trainer.config.training.keep_checkpoints)
    folder.write_data(found.fingerprint, about)
    folder.write_config(trainer.config)


def _what_and_where(trainer: Trainer, parameters: int, folder: RunFolder) -> str:
    training, ranks = trainer.config.training, trainer.ranks
    batch = f"batch {training.batch_size}"
    if training.accumulation > 1:
        batch += f" in {training.accumulation} parts"
    if ranks.size > 1:
        batch += f" over {ranks.size} processes"
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    of_all = "" if trained == parameters else f" of {parameters / 1e6:.2f}"
    return (
        f"training {trained / 1e6:.2f}{of_all} M parameters on {trainer.device}, {training.precision}, {batch}, "
        f"seed {training.seed}, steps {trainer.step} to {training.steps}, in {folder.path}"
    )
