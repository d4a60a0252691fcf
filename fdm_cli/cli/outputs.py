"""Where the files of `fdm sample` and `fdm extend` go: names, checks, the report beside a video, interrupted runs."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdm_cli.cli.plan_report import stage_data
from fdm_cli.errors import BadInput
from fdm_cli.files import refuse_taken

if TYPE_CHECKING:
    from fdm_cli.plan import Stage
    from fdm_cli.work_folder import WorkFolder

MOST_NUMBERED = 10_000  # names that are looked at for an interrupted run


@dataclass(frozen=True)
class Outputs:
    """The files of a run.

    Attributes:
        paths: the videos, one a sample or one for all.
        sheets: a contact sheet for each of them, or none.
        work: what is kept until they are complete, or until the run goes on.
        earlier: what the run was that this one goes on with; None when it starts afresh.
        force: whatever exists may be replaced.
        own: the names of files that may be replaced in any case.
    """

    paths: list[Path]
    sheets: list[Path]
    work: WorkFolder
    earlier: dict[str, Any] | None
    force: bool
    own: frozenset[str]

    @staticmethod
    def of(output: Path | None, stem: str, count: int, *, sheet: bool, force: bool, resume: bool) -> Outputs:
        """The files, checked.

        Args:
            output: the name that the user gave; None chooses one.
            stem: what a chosen name begins with.
            count: how many videos.
            sheet: with contact sheets.
            force: replace what exists, and start over if a run was interrupted; with `resume`, only the former.
            resume: go on with an interrupted run; without one, start.

        Raises:
            BadInput: something exists and may not be replaced; there is an interrupted run that is neither to be
                resumed nor to be forgotten, or more than one to choose from.
        """
        from fdm_cli.video import VIDEO_SHEET
        from fdm_cli.work_folder import WorkFolder

        first = output or (_interrupted(stem) if resume else None) or _unused(stem, count)
        work = WorkFolder(first)
        if work.path.exists() and not work.path.is_dir():
            raise BadInput(f"{work.path} is in the way: unfinished frames are kept under this name", "remove it")
        earlier = work.facts() if resume or not force else None
        if earlier is not None and not resume:
            work.refuse_busy()
            raise BadInput(
                f"{first}: an interrupted run is kept in {work.path}", "--resume goes on with it, --force starts over"
            )
        own = work.replaceable if earlier is not None else frozenset()
        paths = _numbered(first, count)
        sheets = [beside(path, VIDEO_SHEET) for path in paths] if sheet else []
        outputs = Outputs(paths, sheets, work, earlier, force, own)
        outputs.check()
        return outputs

    def check(self) -> None:
        """Raises BadInput when a file could not be written, or exists and may not be replaced."""
        from fdm_cli.video_writer import check_output

        for path in self.paths:
            check_output(path, force=self.force or path.name in self.own)
        for extra in self._extras():
            refuse_taken(extra, self.force or extra.name in self.own)

    def let_replace(self) -> None:
        """An interruption from here on leaves files that may be replaced when the run goes on."""
        self.work.let_replace(file.name for file in [*self.paths, *self._extras()])

    def _extras(self) -> list[Path]:
        return [*(beside(path, ".json") for path in self.paths), *self.sheets]


def beside(path: Path, suffix: str) -> Path:
    """The name of a file that belongs to a video."""
    return path.with_name(path.name + suffix)


def write_report(path: Path, report: Mapping[str, Any], stages: Iterable[Stage]) -> None:
    """Writes how a video was made as JSON: the report and, a line each, the stages as `inspect-scheme` prints them."""
    from fdm_cli.files import replacing

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(report, indent=2).removesuffix("\n}"))
        separator = ',\n  "stages": [\n    '
        for stage in stages:
            file.write(separator + json.dumps(stage_data(stage)))
            separator = ",\n    "
        file.write("\n  ]\n}\n")


def _unused(stem: str, count: int) -> Path:
    """The first name with a number that is free, with the names of what lies beside a video."""
    from fdm_cli.video import VIDEO_SHEET
    from fdm_cli.work_folder import WorkFolder

    def is_free(path: Path) -> bool:
        videos = _numbered(path, count)
        extras = [beside(video, suffix) for video in videos for suffix in (".json", VIDEO_SHEET)]
        return not any(os.path.lexists(taken) for taken in [*videos, *extras, WorkFolder(path).path])

    return next(filter(is_free, (Path(f"{stem}-{number}.gif") for number in itertools.count(1))))


def _interrupted(stem: str) -> Path | None:
    """The one name that was chosen for a run which was interrupted here; None when there is none."""
    from fdm_cli.work_folder import WorkFolder

    there = {entry.name for entry in Path().iterdir() if entry.suffix == ".work"}
    names = (Path(f"{stem}-{number}.gif") for number in range(1, MOST_NUMBERED if there else 1))
    found = [name for name in names if WorkFolder(name).path.name in there]
    if len(found) > 1:
        raise BadInput("several interrupted runs: " + ", ".join(map(str, found)), "--output names the one to resume")
    return found[0] if found else None


def _numbered(path: Path, count: int) -> list[Path]:
    """The name itself for one video, else name-1, name-2, ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]
