"""The scheme language: YAML -> frozen Scheme.

A sampling scheme (FDM, arXiv 2205.11495, section 3) says in which order a long video is generated: which
frames each network call makes and which it looks at. Here it is data: a list of rounds, each with one
`generate` rule and some `observe` rules. `schemes/README.md` shows every rule with its picture; `plan.py`
turns a scheme into windows.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, get_args

from fdm_cli import yaml_file
from fdm_cli.errors import BadInput, did_you_mean
from fdm_cli.yaml_file import Node

_Name = TypeVar("_Name", bound=str)

Given = Literal["first", "last", "ends", "spread", "closed"]
Start = Literal["contiguous", "spread"]
GenerateRule = Literal["next", "previous", "spread", "gaps", "levels", "frames"]
ObserveRule = Literal["before", "after", "between", "nearest", "latest", "origin", "spread", "frames", "diverse"]

_GIVEN: tuple[Given, ...] = get_args(Given)
_START: tuple[Start, ...] = get_args(Start)
_GENERATE: tuple[GenerateRule, ...] = get_args(GenerateRule)
_OBSERVE: tuple[ObserveRule, ...] = get_args(ObserveRule)

MAX_LEVELS = 16
MAX_ROUNDS = 100
MAX_RULES = 32  # of a round's observed frames
MAX_RANGES = 100
MAX_WINDOW = 4096
MAX_NAME = 60  # characters
MAX_NUMBER = 100_000_000

_SEED_CLASSES = {"Autoregressive": "autoregressive"}
_SEED_PARAMS = ("video_length", "max_frames", "num_observed_frames", "step_size")
_RANGE = re.compile(r"\s*(-?\d{1,9})?\s*:\s*(-?\d{1,9})?\s*(?::\s*(\d{1,9}))?\s*")
_PERCENT = re.compile(r"(\d{1,3})\s*%")


@dataclass(frozen=True, slots=True)
class Amount:
    """How many frames an observe rule takes.

    Attributes:
        kind: `count` takes at most `value` frames, `share` that many percent of the places still free
            (rounded down), `rest` all places still free, `all` every frame there is while the window has room.
        value: the count, or the percentage.
    """

    kind: Literal["count", "share", "rest", "all"]
    value: int = 0


@dataclass(frozen=True, slots=True)
class FrameRange:
    """Frames by number: `start:stop:step` as in Python, negative numbers counting from the end, or one frame.

    Attributes:
        start: the first frame; None is the video's first.
        stop: the frame after the last; None is the video's end. Ignored for a single frame.
        step: every how many frames; 0 means the single frame `start`.
        where: `file:line`.
    """

    start: int | None
    stop: int | None
    step: int
    where: str

    def frames(self, length: int) -> range:
        """The frames of a video of `length` frames; BadInput when there are none."""
        if self.step == 0:
            start = self.start or 0
            frame = start + length if start < 0 else start
            if not 0 <= frame < length:
                raise BadInput(f"{self.where}: frame {start} is outside of the video (0 to {length - 1})")
            return range(frame, frame + 1)
        found = range(length)[self.start : self.stop : self.step]
        if not found:
            raise BadInput(f"{self.where}: the range {self} holds no frame of a video of {length} frames")
        return found

    def __str__(self) -> str:
        if self.step == 0:
            return str(self.start)
        text = f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"
        return text if self.step == 1 else f"{text}:{self.step}"


@dataclass(frozen=True, slots=True)
class Generate:
    """Which unknown frames a round makes.

    Attributes:
        rule: the rule's name.
        levels: for `levels`, how many levels the hierarchy has, the first one included.
        ranges: for `frames`, which ones.
    """

    rule: GenerateRule
    levels: int = 0
    ranges: tuple[FrameRange, ...] = ()


@dataclass(frozen=True, slots=True)
class Observe:
    """Which known frames a window looks at, and how many of them."""

    rule: ObserveRule
    amount: Amount
    ranges: tuple[FrameRange, ...] = ()


@dataclass(frozen=True, slots=True)
class Round:
    """One generate rule, applied until it makes nothing more, with its observe rules.

    Attributes:
        generate: which frames each window makes.
        observe: which frames each window looks at, in order of preference.
        parallel: look only at frames that were known before the round began (`gaps` and `levels`: before
            the present level began), so that all windows fall into one wave.
        only_given: skip the round when the video starts from nothing.
        times: at most this many windows; None is as many as it takes.
        where: `file:line`.
    """

    generate: Generate
    observe: tuple[Observe, ...]
    parallel: bool
    only_given: bool
    times: int | None
    where: str


@dataclass(frozen=True, slots=True)
class Scheme:
    """A sampling scheme.

    Attributes:
        name: what it is called.
        about: what it does, one line.
        length: the video length in frames, unless asked otherwise.
        window: frames per network call, unless asked otherwise.
        step: new frames per network call where the rule does not say more; `window - step` are observed.
        given: where frames that exist beforehand stand; `closed` is `first` in a video whose last frame
            leads back to the first.
        start: where the first window goes when no frames are given; None: the scheme needs given frames.
        rounds: what happens then, in order.
        where: the file.
    """

    name: str
    about: str
    length: int
    window: int
    step: int
    given: Given
    start: Start | None
    rounds: tuple[Round, ...]
    where: str

    @property
    def closed(self) -> bool:
        """Whether time is a circle: the last frame is followed by the first."""
        return self.given == "closed"

    @property
    def adaptive(self) -> bool:
        """Whether observed frames are chosen at run time."""
        return any(rule.rule == "diverse" for item in self.rounds for rule in item.observe)


def folder() -> Path:
    """Where the shipped schemes lie: inside the package in a wheel, beside it in a source tree."""
    inside = Path(__file__).parent / "schemes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "schemes"


def names() -> list[str]:
    """The names of the shipped schemes, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def load(name_or_path: str) -> Scheme:
    """A shipped scheme by its name, or a file by its path (with a slash or an ending `.yaml`, or any that exists).

    Raises:
        BadInput: no such scheme (the hint is the nearest name), or a file that is no scheme, with file and line.
    """
    shipped = names()
    if not name_or_path:
        raise BadInput("the name of the scheme is empty", did_you_mean("", shipped))
    if name_or_path in shipped:
        file = f"{name_or_path}.yaml"
        return from_node(yaml_file.parse((folder() / file).read_text(encoding="utf-8"), file), name_or_path)
    path = Path(name_or_path)
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if not os.path.exists(path):  # noqa: PTH110  (Path.exists raises for a name that is too long)
        what = "scheme file" if looks_like_path else "scheme named"
        raise BadInput(f"no {what} {name_or_path!r}", did_you_mean(path.stem, shipped))
    return from_node(yaml_file.read(path), path.stem)


def from_node(node: Node, default_name: str) -> Scheme:
    """The scheme that a YAML document describes, in this language or in the seed's (`sampling_scheme:`).

    Args:
        node: the document.
        default_name: what the scheme is called if it does not say.

    Raises:
        BadInput: with file and line.
    """
    entries = node.mapping("a scheme")
    if "sampling_scheme" in entries:
        node.refuse_unknown(["sampling_scheme"], "a scheme file of this form")
        return _from_seed(entries["sampling_scheme"], default_name)
    node.refuse_unknown(
        ["name", "about", "length", "window", "step", "given", "start", "rounds"],
        "a scheme",
    )
    window = _number(entries, "window", 16, MAX_WINDOW)
    step = _number(entries, "step", max(1, window // 2))
    if step > window:
        entries["step"].fail(f"step {step} is larger than the window {window}")
    given: Given = "first"
    if "given" in entries:
        given = _one_of(entries["given"], _GIVEN, "given")
    start = _one_of(entries["start"], _START, "start") if "start" in entries else None
    rounds = entries["rounds"].sequence("rounds") if "rounds" in entries else []
    if len(rounds) > MAX_ROUNDS:
        entries["rounds"].fail(f"more than {MAX_ROUNDS} rounds")
    if not rounds and start is None:
        node.fail("a scheme needs rounds, or a start", "rounds: [{generate: next, observe: [before: rest]}]")
    return Scheme(
        name=_text(entries["name"], "name", MAX_NAME) if "name" in entries else default_name,
        about=_text(entries["about"], "about") if "about" in entries else "",
        length=_number(entries, "length", 160),
        window=window,
        step=step,
        given=given,
        start=start,
        rounds=tuple(_round(item) for item in rounds),
        where=node.where,
    )


def _round(node: Node) -> Round:
    entries = node.mapping("a round")
    node.refuse_unknown(["generate", "observe", "parallel", "when", "times"], "a round")
    if "generate" not in entries:
        node.fail("a round needs a generate rule", f"generate: one of {', '.join(_GENERATE)}")
    parallel = entries["parallel"].value if "parallel" in entries else False
    if not isinstance(parallel, bool):
        entries["parallel"].fail(f"parallel must be true or false, not {yaml_file.describe(entries['parallel'])}")
    if "when" in entries:
        _one_of(entries["when"], ("given",), "when")
    return Round(
        generate=_generate(entries["generate"]),
        observe=_observe(entries["observe"]) if "observe" in entries else (),
        parallel=parallel,
        only_given="when" in entries,
        times=_whole(entries["times"], "times", 1) if "times" in entries else None,
        where=node.where,
    )


def _generate(node: Node) -> Generate:
    known = _GENERATE
    if not isinstance(node.value, dict):
        rule = _one_of(node, known, "generate")
        if rule in ("levels", "frames"):
            node.fail(f"{rule} needs a value", "levels: 2" if rule == "levels" else 'frames: "0:16"')
        return Generate(rule)
    rule, value = _single_entry(node, known, "generate")
    if rule == "levels":
        return Generate(rule, levels=_whole(value, "levels", 2, MAX_LEVELS))
    if rule == "frames":
        return Generate(rule, ranges=_ranges(value))
    return value.fail(f"{rule} takes no value", f"generate: {rule}")


def _observe(node: Node) -> tuple[Observe, ...]:
    known = _OBSERVE
    rules: list[Observe] = []
    items = node.sequence("observe")
    if len(items) > MAX_RULES:
        node.fail(f"observe: more than {MAX_RULES} rules")
    for item in items:
        if rules and rules[-1].rule == "diverse":
            item.fail("nothing can follow diverse, which is chosen at run time", "put diverse last")
        if not isinstance(item.value, dict):
            rule = _one_of(item, known, "observe")
            if rule == "frames":
                item.fail("frames needs a value", 'frames: "0:4"')
            rules.append(Observe(rule, Amount("rest")))
            continue
        rule, value = _single_entry(item, known, "observe")
        if rule == "frames":
            rules.append(Observe(rule, Amount("all"), _ranges(value)))
        else:
            amount = _amount(value, rule)
            if rule == "diverse" and amount.kind == "all":
                value.fail("diverse cannot take all", "diverse: rest")
            rules.append(Observe(rule, amount))
    return tuple(rules)


def _single_entry(node: Node, known: tuple[_Name, ...], what: str) -> tuple[_Name, Node]:
    entries = node.mapping(what)
    node.refuse_unknown(known, what)
    if len(entries) != 1:
        node.fail(f"{what}: one rule at a time, not {len(entries)}", "write each rule as its own list item")
    ((rule, value),) = entries.items()
    return next(name for name in known if name == rule), value


def _amount(node: Node, rule: str) -> Amount:
    value = node.value
    if isinstance(value, int) and not isinstance(value, bool):
        return Amount("count", _whole(node, rule, 1))
    if value == "half":
        return Amount("share", 50)
    if value == "rest":
        return Amount("rest")
    if value == "all":
        return Amount("all")
    if isinstance(value, str):
        match = _PERCENT.fullmatch(value)
        if match and 1 <= int(match[1]) <= 100:
            return Amount("share", int(match[1]))
    return node.fail(
        f"{rule}: an amount is a number of frames, half, rest, all, or 1% to 100%, not {yaml_file.describe(node)}",
        did_you_mean(value, ["half", "rest", "all"]) if isinstance(value, str) else None,
    )


def _ranges(node: Node) -> tuple[FrameRange, ...]:
    items = node.value if isinstance(node.value, list) else [node]
    if not items:
        node.fail("frames: names no frame", 'frames: "0:16"')
    if len(items) > MAX_RANGES:
        node.fail(f"frames: more than {MAX_RANGES} ranges", '"0:100:2" is every second')
    return tuple(frame_range(item) for item in items)


def frame_range(node: Node) -> FrameRange:
    """A frame number or a range `start:stop:step`; BadInput, with the node's place, for anything else."""
    value = node.value
    if isinstance(value, int) and not isinstance(value, bool):
        return FrameRange(_whole(node, "frames", -MAX_NUMBER), None, 0, node.where)
    match = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        node.fail(
            f"frames: a frame number or start:stop:step, not {yaml_file.describe(node)}",
            '"0:16" is the first 16 frames, "-8:" the last 8, "::10" every tenth',
        )
    start, stop, step = (None if text is None else int(text) for text in match.groups())
    if step == 0:
        node.fail("frames: the step of a range is at least 1")
    return FrameRange(start, stop, step or 1, node.where)


def _number(entries: dict[str, Node], key: str, default: int, high: int = MAX_NUMBER) -> int:
    return _whole(entries[key], key, 1, high) if key in entries else default


def _whole(node: Node, what: str, low: int, high: int = MAX_NUMBER) -> int:
    value = node.value
    if not isinstance(value, int) or isinstance(value, bool):
        node.fail(f"{what} must be a whole number, not {yaml_file.describe(node)}")
    if not low <= value <= high:
        node.fail(f"{what} must be from {low} to {high}, not {value}")
    return value


def _text(node: Node, what: str, most: int = MAX_NUMBER) -> str:
    value = node.value
    if not isinstance(value, str):
        node.fail(f"{what} must be text, not {yaml_file.describe(node)}", "put it in quotes")
    text = " ".join(value.split())
    if not text or not text.isprintable():
        node.fail(f"{what} must be printable text")
    if len(text) > most:
        node.fail(f"{what} must be at most {most} characters, not {len(text)}")
    return text


def _one_of(node: Node, known: tuple[_Name, ...], what: str) -> _Name:
    for name in known:
        if node.value == name:
            return name
    hint = did_you_mean(node.value, known) if isinstance(node.value, str) else "known: " + ", ".join(known)
    return node.fail(f"{what}: unknown {yaml_file.describe(node)}", hint)


def _from_seed(node: Node, name: str) -> Scheme:
    """The seed's own form: a class by its dotted path, with its arguments."""
    entries = node.mapping("sampling_scheme")
    node.refuse_unknown(["target", "params"], "sampling_scheme")
    for key in ("target", "params"):
        if key not in entries:
            node.fail(f"sampling_scheme needs {key!r}")
    target = _text(entries["target"], "target").rpartition(".")[2]
    if target not in _SEED_CLASSES:
        entries["target"].fail(f"unknown scheme class {target!r}", did_you_mean(target, _SEED_CLASSES))
    params = entries["params"].mapping("params")
    entries["params"].refuse_unknown(_SEED_PARAMS, "params")
    window = _number(params, "max_frames", 16, MAX_WINDOW)
    step = _number(params, "step_size", max(1, window // 2))
    if step > window:
        params["step_size"].fail(f"step_size {step} is larger than max_frames {window}")
    starts_from = (
        _whole(params["num_observed_frames"], "num_observed_frames", 0) if ("num_observed_frames" in params) else 0
    )
    scheme = load(_SEED_CLASSES[target])
    return replace(
        scheme,
        name=name,
        length=_number(params, "video_length", scheme.length),
        window=window,
        step=step,
        start=None if starts_from else scheme.start,
        where=node.where,
    )
