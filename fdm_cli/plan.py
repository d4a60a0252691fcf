"""Scheme -> Plan: the windows of a long video, in order, with what may run side by side.

N frames are made K at a time (FDM, arXiv 2205.11495). A plan is a row of stages, each one network window of
observed and latent frames. Stages that need nothing from each other share a **wave** and may run as one batch.
The rules that propose frames live in `rules.py`; here every proposal is checked, whatever scheme it comes from.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import overload

from fdm_cli import given as givens
from fdm_cli import rules
from fdm_cli.errors import BadInput
from fdm_cli.frame_set import FrameSet
from fdm_cli.scheme import MAX_WINDOW, Round, Scheme

MAX_LENGTH = 100_000_000
MAX_PLACES = 20_000_000


@dataclass(frozen=True, slots=True)
class Choice:
    """Observed frames that are chosen when the stage runs, by how different they look.

    Attributes:
        always: observed in any case; the farthest-point selection starts from these.
        among: the candidates are the given frames and the latent frames of the first `among` stages.
    """

    always: tuple[int, ...]
    among: int


@dataclass(frozen=True, slots=True)
class Stage:
    """One network window.

    Attributes:
        observed: the frames it looks at, sorted; None when they are chosen at run time.
        observed_count: how many frames it looks at.
        latent: the frames it makes, sorted.
        wave: 0 when it needs nothing that is generated, else one more than the latest wave it needs.
        choice: how to choose the observed frames at run time; None when they are known.
    """

    observed: tuple[int, ...] | None
    observed_count: int
    latent: tuple[int, ...]
    wave: int
    choice: Choice | None = None


class Stages(Sequence[Stage]):
    """The stages of a plan, kept as flat arrays: a plan of a million frames takes megabytes, not gigabytes."""

    __slots__ = ("_choices", "_frames", "_latent_at", "_starts", "_waves")

    def __init__(self) -> None:
        self._frames = array("i")
        self._starts = array("q", [0])
        self._latent_at = array("q")
        self._waves = array("i")
        self._choices: dict[int, tuple[int, int]] = {}

    def append(self, observed: Sequence[int], latent: Sequence[int], wave: int, more: int, among: int) -> None:
        """Adds a stage with `more` observed frames to be chosen from what the first `among` stages made."""
        if more:
            self._choices[len(self._waves)] = (more, among)
        self._frames.extend(observed)
        self._latent_at.append(len(self._frames))
        self._frames.extend(latent)
        self._starts.append(len(self._frames))
        self._waves.append(wave)

    def __len__(self) -> int:
        return len(self._waves)

    @overload
    def __getitem__(self, index: int) -> Stage: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Stage, ...]: ...
    def __getitem__(self, index: int | slice) -> Stage | tuple[Stage, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if index < 0:
            index += len(self)
        wave = self._waves[index]
        middle = self._latent_at[index]
        observed = tuple(self._frames[self._starts[index] : middle])
        latent = tuple(self._frames[middle : self._starts[index + 1]])
        if index not in self._choices:
            return Stage(observed, len(observed), latent, wave)
        more, among = self._choices[index]
        return Stage(None, len(observed) + more, latent, wave, Choice(observed, among))

    @property
    def waves(self) -> Sequence[int]:
        """The wave of every stage."""
        return self._waves

    @property
    def observed_counts(self) -> Iterator[int]:
        """How many frames every stage looks at."""
        for index, (start, middle) in enumerate(zip(self._starts, self._latent_at, strict=False)):
            yield middle - start + self._choices.get(index, (0, 0))[0]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A checked plan: every frame is given or made exactly once, from frames known by then.

    Attributes:
        scheme: the scheme's name.
        length: N, in frames.
        window: K, the most frames of any stage.
        step: new frames per stage where the scheme's rules ask for it.
        begin: frames that the first window begins with; None when it is made at once, or frames are given.
        given: the frames that exist beforehand, as half-open ranges, sorted and apart.
        closed: time is a circle; an observed frame may stand after the last frame or before the first
            (`positions`).
        stages: in the order of the scheme.
        waves: how many waves there are.
        reach: the furthest two frames of one window are apart, in frames; with run-time choice, may be.
        makers: for each frame the number of the stage that makes it; -1 for given ones.
    """

    scheme: str
    length: int
    window: int
    step: int
    begin: int | None
    given: tuple[tuple[int, int], ...]
    closed: bool
    stages: Stages
    waves: int
    reach: int
    makers: Sequence[int]

    @property
    def calls(self) -> int:
        """How many windows there are: network calls per denoising step, taken one by one."""
        return len(self.stages)

    def by_wave(self) -> Iterator[tuple[int, ...]]:
        """The numbers of the stages of each wave, wave after wave: the order in which a plan is executed."""
        waves = self.stages.waves
        for _, group in groupby(sorted(range(len(waves)), key=waves.__getitem__), key=waves.__getitem__):
            yield tuple(group)

    @property
    def widest(self) -> int:
        """How many windows of one wave there are at most."""
        return max(map(len, self.by_wave()), default=0)

    @property
    def given_frames(self) -> list[int]:
        """The frames that exist beforehand, one by one."""
        return [frame for start, stop in self.given for frame in range(start, stop)]

    def positions(self, stage: Stage, observed: Sequence[int]) -> tuple[int, ...]:
        """Where observed frames stand in time, as the network is to see them.

        That is their own number; in a closed plan it is the number, or the number plus or minus the length:
        the side on which the frame is nearer to the stage's latent frames.
        """
        if not self.closed:
            return tuple(observed)
        return tuple(_nearest_turn(frame, stage.latent[0], stage.latent[-1], self.length) for frame in observed)


def make(
    scheme: Scheme,
    *,
    length: int | None = None,
    window: int | None = None,
    step: int | None = None,
    begin: int | None = None,
    given: Sequence[givens.Span] = (),
) -> Plan:
    """Makes the plan of a scheme.

    Args:
        scheme: from `scheme.load`.
        length: N, the frames of the whole video, given ones included; None is the scheme's.
        window: K, the most frames of a network call; None is the scheme's.
        step: new frames per call; None is the scheme's, or its share of another window, at least 1.
        begin: where nothing is given, how many frames the first window begins with: they are made by themselves, then
            as many again that observe them, until it is whole, see `rules.pieces`; None is the whole window at once.
        given: half-open ranges of frames that exist beforehand; they may touch and overlap.

    Raises:
        BadInput: impossible sizes; a scheme that breaks an invariant, with its line, the stage and the frame.
    """
    length = scheme.length if length is None else length
    step = givens.default_step(scheme, window) if step is None else step
    window = scheme.window if window is None else window
    check_length(length, length)  # before frames of it are listed
    _check_sizes(window, step)
    if begin is not None and begin < 1:
        raise BadInput(f"a window cannot begin with {begin} frames")
    spans = givens.merge(given, length)
    if not spans and scheme.start is None:
        example = givens.as_typed(givens.example(scheme, length=length, window=window, step=step))
        raise BadInput(f"{scheme.name} needs given frames ({givens.WHERE[scheme.given]})", f"--given {example}")
    check_length(length, sum(stop - start for start, stop in spans))
    draft = _Draft(scheme, length, window, step, spans, begin)
    for item in scheme.rounds:
        if spans or not item.only_given:
            draft.run(item)
    return draft.finish()


def check_length(length: int, given: int) -> None:
    """Refuses a length that no scheme can make when so many of its frames are given; BadInput."""
    if not 1 <= length <= MAX_LENGTH:
        raise BadInput(f"the length must be from 1 to {MAX_LENGTH:,} frames, not {length}")
    if length - given > MAX_PLACES:
        raise _too_large()


def _check_sizes(window: int, step: int) -> None:
    if not 1 <= window <= MAX_WINDOW:
        raise BadInput(f"the window must be from 1 to {MAX_WINDOW:,} frames, not {window}")
    if not 1 <= step <= window:
        raise BadInput(f"the step must be from 1 to the window ({window} frames), not {step}")


def _within(frames: list[int], length: int) -> bool:
    """Whether sorted frames are all of the video, and each is there once."""
    return frames[0] >= 0 and frames[-1] < length and len(set(frames)) == len(frames)


def _too_large() -> BadInput:
    return BadInput(
        f"the plan is too large: its windows hold more than {MAX_PLACES:,} frames in all",
        "a smaller length, or a larger step",
    )


def _nearest_turn(frame: int, first: int, last: int, length: int) -> int:
    """Which of frame, frame - length, frame + length is nearest to first..last; itself when in doubt."""
    if frame < first:
        return frame if first - frame <= frame + length - last else frame + length
    if frame > last:
        return frame if frame - last <= first - (frame - length) else frame - length
    return frame


class _Draft:
    """A plan in the making: runs rounds, checks every stage, keeps count of waves."""

    def __init__(
        self,
        scheme: Scheme,
        length: int,
        window: int,
        step: int,
        given: tuple[tuple[int, int], ...],
        begin: int | None,
    ) -> None:
        known = FrameSet(length)
        for start, stop in given:
            known.add_range(start, stop)
        self.scheme = scheme
        self.given = given
        self.begin: int | None = None
        self.board = rules.Board(length, window, step, scheme.closed, known, known)
        self.stages = Stages()
        self.makers = array("i", [-1]) * length
        self.waves_made = array("i", [-1]) * length
        self.latest_wave = -1
        self.reach = 0
        self.places = 0
        self.among, self.wave_among = 0, -1
        if given:
            spans = [range(start, stop) for start, stop in given]
            # One span, of which there may be millions of frames, is not written out.
            self.board.origin = spans[0] if len(spans) == 1 else [frame for span in spans for frame in span]
        elif scheme.start is not None:
            self.board.origin = rules.start(scheme.start, length, window, scheme.closed)
            if begin is not None and begin < len(self.board.origin):
                self.begin = begin
            for observed, latent in rules.pieces(self.board.origin, self.begin):
                self.add(scheme.where, observed, latent, 0)

    def run(self, item: Round) -> None:
        """Makes all the stages of a round."""
        board = self.board
        board.visible = board.known
        now = -1
        for count, (number, latent) in enumerate(rules.generate(board, item)):
            if count == item.times:
                break
            if not item.parallel or number != now:
                now = number
                self.among, self.wave_among = len(self.stages), self.latest_wave
                if item.parallel:
                    board.visible = board.known.copy()
            observed, more = rules.observe(board, item, latent)
            self.add(item.where, observed, latent, more)

    def add(self, where: str, observed: list[int], latent: list[int], more: int) -> None:
        """Adds a stage after checking it; `more` observed frames are chosen at run time."""
        number = len(self.stages)
        observed.sort()
        self._check(where, number, observed, latent, more)
        waves, makers = self.waves_made, self.makers
        wave = 1 + (self.wave_among if more else max(map(waves.__getitem__, observed), default=-1))
        self.board.known.add(latent)
        for frame in latent:
            waves[frame] = wave
            makers[frame] = number
        self.stages.append(observed, latent, wave, more, self.among)
        self.latest_wave = max(self.latest_wave, wave)
        self._measure_reach(observed, latent, more)

    def _check(self, where: str, number: int, observed: list[int], latent: list[int], more: int) -> None:
        """The invariants of a stage."""
        board = self.board
        length, known, visible = board.length, board.known, board.visible
        if len(observed) + more + len(latent) > board.window:
            frame = latent[0] if latent else 0
            raise BadInput(
                f"{where}: window {number}, which makes frame {frame}: {len(observed) + more} observed and "
                f"{len(latent)} latent frames do not fit into a window of {board.window}",
                "a larger window, or a smaller --length",
            )
        if not latent:
            raise BadInput(f"{where}: window {number} makes no frame")
        if not _within(latent, length) or known.count_of(latent):
            frame = next((f for f in latent if not 0 <= f < length or f in known), latent[0])
            raise BadInput(f"{where}: window {number}: frame {frame} is not a new frame of the video")
        if observed and (not _within(observed, length) or visible.count_of(observed) < len(observed)):
            frame = next((f for f in observed if not 0 <= f < length or f not in visible), observed[0])
            raise BadInput(
                f"{where}: window {number} observes frame {frame}, which is not known by then",
                "observe frames that are given or that an earlier round makes",
            )
        self.places += len(observed) + len(latent)
        if self.places > MAX_PLACES:
            raise _too_large()

    def _measure_reach(self, observed: list[int], latent: list[int], more: int) -> None:
        board = self.board
        if more and board.closed:  # each frame stands on the side where it is nearer: all of them within one round
            low, high = 0, board.length - 1
        elif more:
            low = min(latent[0], board.visible.next_in(0))
            high = max(latent[-1], board.visible.previous_in(board.length))
        else:
            low, high = latent[0], latent[-1]
            if observed and board.closed:
                places = [_nearest_turn(frame, low, high, board.length) for frame in observed]
                low, high = min(low, *places), max(high, *places)
            elif observed:
                low, high = min(low, observed[0]), max(high, observed[-1])
        self.reach = max(self.reach, high - low)

    def finish(self) -> Plan:
        """The plan, after checking that nothing is left to make."""
        board, scheme = self.board, self.scheme
        missing = board.known.next_out(0)
        if missing >= 0:
            count = board.length - board.known.count
            raise BadInput(
                f"{scheme.where}: {scheme.name} never makes frame {missing} "
                f"({count:,} of {board.length:,} frames remain)",
                f"its given frames stand {givens.WHERE[scheme.given]}"
                if self.given
                else "a shorter --length, or a scheme with a round that makes the rest",
            )
        return Plan(
            scheme=scheme.name,
            length=board.length,
            window=board.window,
            step=board.step,
            begin=self.begin,
            given=self.given,
            closed=scheme.closed,
            stages=self.stages,
            waves=self.latest_wave + 1,
            reach=self.reach,
            makers=self.makers,
        )
