"""A plan in words and as data, the same for every command that shows one, and what there is to be warned of."""

from __future__ import annotations

from typing import Any

from fdm_cli import given as givens
from fdm_cli.cli.render import Output, plural
from fdm_cli.plan import Plan, Stage


def as_data(plan: Plan, *, with_stages: bool = True) -> dict[str, Any]:
    """The plan as JSON prints it."""
    data: dict[str, Any] = {
        "scheme": plan.scheme,
        "length": plan.length,
        "window": plan.window,
        "step": plan.step,
        "begin": plan.begin,
        "given": plan.given,
        "calls": plan.calls,
        "waves": plan.waves,
        "reach": plan.reach,
    }
    if plan.closed:
        data["closed"] = True
    if with_stages:
        data["stages"] = [stage_data(stage) for stage in plan.stages]
    return data


def stage_data(stage: Stage) -> dict[str, Any]:
    """A stage as JSON prints it; where the observed frames are chosen at run time, how many instead of which."""
    count = {} if stage.observed is not None else {"observed_count": stage.observed_count}
    return {"wave": stage.wave, "observed": stage.observed, **count, "latent": stage.latent}


def describe(plan: Plan, clip_length: int | None = None) -> str:
    """The plan in two lines: its sizes, and what it costs.

    Args:
        plan: the plan.
        clip_length: the longest clip, in frames, that the model was trained on; adds how the reach stands to it.
    """
    counts = list(plan.stages.observed_counts)
    low, high = min(counts, default=0), max(counts, default=0)
    observed = f"{low}" if low == high else f"{low} to {high} (mean {sum(counts) / len(counts):.1f})"
    reach = f"reach {plural(plan.reach, 'frame')}"
    if clip_length is not None:
        fits = plan.reach < clip_length
        reach += f" ({'within' if fits else 'beyond'} the {clip_length:,} frames of a training clip)"
    given = f", given {_shorten(givens.as_typed(plan.given))}" if plan.given else ""
    return (
        f"{plan.scheme}: {plural(plan.length, 'frame')}, {sizes(plan)}{given}\n"
        f"{plural(plan.calls, 'window')} in {plural(plan.waves, 'wave')}, "
        f"observed frames per window {observed}, {reach}"
    )


def sizes(plan: Plan) -> str:
    """Its windows' sizes in words."""
    begin = f", begin {plan.begin}" if plan.begin is not None else ""
    return f"window {plan.window}, step {plan.step}{begin}"


def warn_of_reach(plan: Plan, clip_length: int, output: Output, what: str = "the scheme") -> None:
    """Says when a plan's windows reach further than the clips that the model was trained on."""
    if plan.reach >= clip_length:
        output.warn(
            f"{what} reaches {plural(plan.reach, 'frame')}, the model was trained on clips of {clip_length}, "
            f"which reach {clip_length - 1}: expect poor frames"
        )


def warn_of_blind(plan: Plan, output: Output, where: str = "") -> None:
    """Says when windows after the first look at nothing, so that their frames have nothing to do with the others."""
    blind = sum(not count for count in plan.stages.observed_counts)
    if blind > (not plan.given):
        more = "a smaller --step" if plan.step > 1 else "a model with a larger window"
        output.warn(
            f"{where}{blind} of {plural(plan.calls, 'window')} observe no frame: the video jumps; "
            f"{more}, or a scheme that observes more"
        )


def warn_of_begin(plan: Plan, begin: int | None, output: Output, where: str = "") -> None:
    """Says when there is no first window to begin with."""
    if begin is not None and plan.given:
        output.warn(f"{where}--begin changes nothing where frames are given")


def warn_of_window(plan: Plan, trained: int, output: Output) -> None:
    """Says when a plan's windows hold more frames than the model was trained on."""
    if plan.window > trained:
        output.warn(f"windows of {plan.window} frames, the model was trained on {trained}: expect poor frames")


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37].rpartition(',')[0]},..."
