"""What commands that compute say of memory, and the refusal before anything is started."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from fdm_cli.budget import T4_USABLE, Budget, parse_size
from fdm_cli.cli.render import Output, plural
from fdm_cli.errors import BadInput

if TYPE_CHECKING:
    import torch

    from fdm_cli.checkpoint import Checkpoint
    from fdm_cli.config import Config
    from fdm_cli.memory import SamplingCall, SamplingMemory, TrainingMemory, TrainingStep
    from fdm_cli.plan import Plan

MOST_WINDOWS = {"cpu": 16, "cuda": 64}  # in a network call; more gain nothing
PATIENCE = 10.0  # seconds after which no further remedies are tried


def budget_of(option: str | None, device: torch.device) -> Budget | None:
    """What `--memory-budget` says, else what is free on the device. Raises BadInput for a malformed option."""
    from fdm_cli import budget

    return Budget(parse_size(option), "--memory-budget") if option else budget.available(device)


def check_training(
    config: Config, device: torch.device, option: str | None, output: Output, ranks: int, *, resumed: bool
) -> str:
    """Refuses a step that does not fit the budget.

    Returns:
        how it stands, in one line; empty when the estimate could not be made.

    Raises:
        BadInput: too large, with the largest batch that fits and what else would help.
    """
    from fdm_cli import memory

    budget = budget_of(option, device)
    try:
        step = memory.TrainingStep(config, ranks)
        peak = step.peak(config.training.batch_size // step.parts)
        margin = memory.MARGINS[device.type]
        if budget is not None and not margin.fits(peak, budget.size):
            _refuse(step, device, budget, peak, resumed)
    except memory.NotCounted as error:
        output.warn(f"{error.message}; training starts without the memory check")
        return ""
    if budget is None:
        output.warn("the system does not say how much memory is free; training starts without the memory check")
    return _standing_line("a step needs", peak, budget, device)


def training_plan(
    config: Config, device: torch.device, option: str | None, ranks: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """For `--dry-run`: the memory as a plain dict, None when it cannot be estimated, and as lines for a person."""
    from fdm_cli import memory

    budget = budget_of(option, device)
    try:
        found = memory.training_memory(memory.TrainingStep(config, ranks), budget, device.type)
    except memory.NotCounted as error:
        return None, [error.message]
    batch = config.training.batch_size
    lines = [
        f"memory at batch {batch}: {gigabytes(found.peak)} at the peak and a margin of {gigabytes(found.margin)}",
        f"of it: parameters {gigabytes(found.parameters)}, optimizer {gigabytes(found.optimizer)}, "
        f"EMA {gigabytes(found.ema)}, activations {gigabytes(found.activations)}; "
        f"gradients later {gigabytes(found.gradients)}",
        *_standing(found, budget, "batch"),
    ]
    return dataclasses.asdict(found), lines


def sampling_batch(
    checkpoint: Checkpoint,
    asked: int | None,
    widest: int,
    plan: Plan,
    budget: Budget | None,
    device: torch.device,
    output: Output,
    *,
    resumed: bool = False,
    remark: bool = False,
) -> int:
    """How many windows of a plan a network call may take: what was asked for, else the most that fits.

    Args:
        checkpoint: the model.
        asked: `--max-batch`; None leaves it to the memory, up to MOST_WINDOWS.
        widest: windows of the plan's widest wave, all samples together: no call is larger.
        plan: that is to be executed; every window counts as one of its longest.
        budget: None when the system does not say.
        device: that computes.
        output: for remarks.
        resumed: what was asked for is not an option but what the interrupted run began with.
        remark: say how it stands, against a T4 too.

    Raises:
        BadInput: what was asked for does not fit, with the largest --max-batch that does; or not even one window fits.
    """
    from fdm_cli import memory

    wanted = asked or MOST_WINDOWS.get(device.type, MOST_WINDOWS["cpu"])
    batch = min(wanted, widest)
    try:
        call = _sampling_call(checkpoint, plan)
        peak = call.peak(batch)
        margin = memory.MARGINS[device.type]
        if budget is None:
            output.warn("the system does not say how much memory is free; sampling starts without the memory check")
        elif not margin.fits(peak, budget.size):
            largest = call.largest(margin.room(budget.size))
            if not largest or asked:
                batch = batch if asked else 1
                remedy = "not even one window fits; a shorter window needs less"
                if largest:
                    remedy = f"--max-batch {largest} fits"
                if asked and resumed:
                    remedy = "the interrupted run began with so many; it can go on when more memory is free"
                peak, windows = call.peak(batch), f"{batch} windows" if batch > 1 else "one window"
                raise BadInput(
                    f"a network call on {windows} of {plan.window} frames needs {gigabytes(peak + margin.on(peak))} "
                    f"of memory, there are {gigabytes(budget.size)} ({budget.source})",
                    remedy,
                )
            wanted = batch = largest
            peak = call.peak(batch)
        if remark:
            output.note(_standing_line(f"a network call on {plural(batch, 'window')} needs", peak, budget, device))
    except memory.NotCounted as error:
        output.warn(f"{error.message}; sampling starts without the memory check")
    return wanted


def sampling_plan(
    checkpoint: Checkpoint, batch: int, plan: Plan, budget: Budget | None, device: torch.device
) -> tuple[dict[str, Any] | None, str]:
    """For `--dry-run`: the memory as a plain dict, None when it cannot be estimated, and for a person."""
    from fdm_cli import memory

    try:
        found = memory.sampling_memory(_sampling_call(checkpoint, plan), batch, budget, device.type)
    except memory.NotCounted as error:
        return None, error.message
    windows = plural(batch, "window")
    peak = f"memory of {windows} in a network call: {gigabytes(found.peak)}, margin {gigabytes(found.margin)}"
    return dataclasses.asdict(found), "\n".join([peak, *_standing(found, budget, "--max-batch")])


def _sampling_call(checkpoint: Checkpoint, plan: Plan) -> SamplingCall:
    from fdm_cli import memory
    from fdm_cli.batch import most_distances

    return memory.SamplingCall(checkpoint.config, plan.window, distances=most_distances(plan))


def sampling_budget(option: str | None, checkpoint: Checkpoint, device: torch.device) -> Budget | None:
    """As `budget_of`, but what is free now and what the loaded model has taken already. Raises BadInput."""
    budget = budget_of(option, device)
    if budget is None or option:
        return budget
    taken = sum(parameter.numel() * parameter.element_size() for parameter in checkpoint.model.parameters())
    return Budget(budget.size + taken, budget.source)


def gigabytes(size: int) -> str:
    """Bytes for a person, in decimal units as memory is sold: `16.0 GB`, `85 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _standing_line(what: str, peak: int, budget: Budget | None, device: torch.device) -> str:
    """How a step or call stands against what is there and a T4, with the margins."""
    from fdm_cli import memory

    here, on_t4 = memory.MARGINS[device.type], memory.MARGINS["cuda"]
    return (
        f"memory: {what} {gigabytes(peak + here.on(peak))}"
        + (f" of {gigabytes(budget.size)} ({budget.source})" if budget else "")
        + f"; {'fits' if on_t4.fits(peak, T4_USABLE) else 'does not fit'} a T4 "
        f"({gigabytes(peak + on_t4.on(peak))} of {gigabytes(T4_USABLE)})"
    )


def _standing(found: TrainingMemory | SamplingMemory, budget: Budget | None, what: str) -> list[str]:
    here = "the system does not say how much memory is free"
    if budget is not None:
        here = f"{gigabytes(budget.size)} ({budget.source}): {_verdict(found.fits, found.largest_batch, what)}"
    return [here, f"a T4 ({gigabytes(T4_USABLE)}): {_verdict(found.t4.fits, found.t4.largest_batch, what)}"]


def _verdict(fits: bool | None, largest: int | None, what: str) -> str:
    return f"{'fits' if fits else 'too large'}, largest {what} {largest}"


def _refuse(step: TrainingStep, device: torch.device, budget: Budget, peak: int, resumed: bool) -> None:
    from fdm_cli import memory

    margin = memory.MARGINS[device.type]
    room = margin.room(budget.size)
    training = step.config.training
    largest = step.largest(room)
    remedies = [] if largest else ["not even one clip at a time fits"]
    if largest and not resumed:  # whose batch size is what it is
        remedies.append(f"--batch-size {largest * step.parts} fits")
    if training.accumulation == 1:
        split = _split(step, room)
        if split is not None:
            remedies.append(f"--set training.accumulation={split} computes it in parts that fit")
    half = _half(device)
    began = time.monotonic()
    for change, words in (
        ({"activation_checkpointing": True}, "--set training.activation_checkpointing=true"),
        ({"precision": half}, f"--set training.precision={half}"),
        ({"activation_checkpointing": True, "precision": half}, "both"),
    ):
        known = {key: getattr(training, key) for key in change}
        if known.get("activation_checkpointing") is True or known.get("precision") in ("fp16", "bf16"):
            continue
        if time.monotonic() - began > PATIENCE:
            break
        most = step.with_training(**change).largest(room) * step.parts
        if most:
            remedies.append(f"{words}: up to {most}")
    raise BadInput(
        f"a step of {training.batch_size} clips needs {gigabytes(peak + margin.on(peak))} of memory, "
        f"there are {gigabytes(budget.size)} ({budget.source})",
        "; ".join(remedies),
    )


def _split(step: TrainingStep, room: int) -> int | None:
    """The smallest number of equal parts of a step's clips on one rank, such that a part fits.

    While the second part is computed the gradients of the first are there, which is all that parts cost.
    """
    clips = step.config.training.batch_size // step.parts
    largest = min(step.largest(room - step.gradients), clips)
    return next((clips // size for size in range(largest, 0, -1) if clips % size == 0), None)


def _half(device: torch.device) -> str:
    """The half precision that the device computes in: a T4 wants fp16."""
    if device.type != "cuda":
        return "bf16"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
