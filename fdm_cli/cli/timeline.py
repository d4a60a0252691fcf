"""A plan as text: frames across, windows down, told apart by characters, not by colour."""

from __future__ import annotations

from dataclasses import dataclass

from fdm_cli.plan import Plan, Stage
from fdm_cli.ticks import round_step

_HEAD_ROWS = 24
_TAIL_ROWS = 12


@dataclass(frozen=True)
class Marks:
    """The characters of a picture, one for each thing that a frame can be to a stage."""

    latent: str
    observed: str
    candidate: str
    known: str
    ellipsis: str


UNICODE = Marks(latent="█", observed="▒", candidate="░", known="·", ellipsis="…")
ASCII = Marks(latent="#", observed="o", candidate="?", known=".", ellipsis="...")


def timeline(plan: Plan, columns: int, marks: Marks) -> str:
    """The picture of a plan with its axis and legend, `columns` wide but for words; long plans lose their middle."""
    numbers = max(len(str(max(plan.calls - 1, 0))), 6 if columns >= 60 else 2)
    waves = max(len(str(max(plan.waves - 1, 0))), 4) if columns >= 60 else 0
    margin = numbers + 2 + (waves + 2 if waves else 0)
    room = max(columns - margin, 1)
    per_column = -(-plan.length // room)
    cells = -(-plan.length // per_column)
    makers = [
        min(plan.makers[at : at + per_column], default=-1) for at in range(0, plan.length, per_column)
    ]  # from which stage on a column holds a known frame
    blank = " " * margin
    heading = ("window" if columns >= 60 else "").rjust(numbers) + ("  " + "wave".rjust(waves) if waves else "")
    lines = [f"{heading}  {_axis(plan.length, per_column, cells)}".rstrip()]
    if plan.given:
        row = [" "] * cells
        for start, stop in plan.given:
            for cell in range(start // per_column, (stop - 1) // per_column + 1):
                row[cell] = marks.known
        lines.append(("given" if margin > 6 else "").ljust(margin) + "".join(row).rstrip())
    shown = list(range(plan.calls))
    cut = len(shown) > _HEAD_ROWS + _TAIL_ROWS + 1
    if cut:
        shown = shown[:_HEAD_ROWS] + shown[-_TAIL_ROWS:]
    for count, index in enumerate(shown):
        if cut and count == _HEAD_ROWS:
            hidden = f"{marks.ellipsis} {plan.calls - len(shown):,} more windows {marks.ellipsis}"
            lines.append(blank + hidden if margin + len(hidden) <= columns else hidden)
        stage = plan.stages[index]
        prefix = str(index).rjust(numbers) + ("  " + str(stage.wave).rjust(waves) if waves else "")
        lines.append(f"{prefix}  {_row(stage, index, makers, per_column, marks)}".rstrip())
    chosen = any(plan.stages[index].choice is not None for index in shown)
    return "\n".join([*lines, "", *_legend(chosen, columns, per_column, marks)])


def _row(stage: Stage, index: int, makers: list[int], per_column: int, marks: Marks) -> str:
    row = [marks.known if maker < index else " " for maker in makers]
    observed = stage.observed or ()
    if stage.choice is not None:
        observed = stage.choice.always
        row = [marks.candidate if maker < stage.choice.among else cell for maker, cell in zip(makers, row, strict=True)]
    for frame in observed:
        row[frame // per_column] = marks.observed
    for frame in stage.latent:
        row[frame // per_column] = marks.latent
    return "".join(row)


def _axis(length: int, per_column: int, cells: int) -> str:
    """Frame numbers at round places, each beginning above its frame."""
    apart = len(str(length)) + 3
    spacing = int(round_step(apart * per_column))
    line = ""
    for frame in range(0, length, spacing):
        at = frame // per_column
        if at + len(str(frame)) <= max(cells, 1):
            line = line.ljust(at) + str(frame)
    return line


def _legend(chosen: bool, columns: int, per_column: int, marks: Marks) -> list[str]:
    entries = [f"{marks.latent} generated", f"{marks.observed} observed"]
    if chosen:
        entries.append(f"{marks.candidate} may be observed (chosen at run time)")
    entries.append(f"{marks.known} known")
    if per_column > 1:
        entries.append(f"a column is {per_column:,} frames")
    lines = [""]
    for entry in entries:
        joined = f"{lines[-1]}   {entry}" if lines[-1] else entry
        if len(joined) > columns and lines[-1]:
            lines.append(entry)
        else:
            lines[-1] = joined
    return lines
