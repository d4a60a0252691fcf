import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdm_cli import given as givens
from fdm_cli import plan, scheme, yaml_file
from fdm_cli.errors import BadInput
from fdm_cli.scheme import Generate, Scheme
from tests.plan_oracle import check, paper_plan

GOLDEN = Path(__file__).parent / "data" / "plans.json.gz"
PAPER = ["autoregressive", "long-range", "hierarchy-2", "hierarchy-3", "hierarchy-4"]

stable = settings(max_examples=200)


def hierarchy(levels: int) -> Scheme:
    first, deeper = scheme.load("hierarchy-3").rounds
    deeper = replace(deeper, generate=Generate("levels", levels=levels))
    return replace(scheme.load("hierarchy-3"), name=f"hierarchy-{levels}", rounds=(first, deeper))


SHIPPED = {name: scheme.load(name) for name in scheme.names()}
SCHEMES = SHIPPED | {"hierarchy-4": hierarchy(4)}


def user_scheme(text: str) -> Scheme:
    return scheme.from_node(yaml_file.parse(text, "mine.yaml"), "mine")


def windows(made: plan.Plan) -> list[list[list[int]]]:
    return [[list(stage.observed or ()), list(stage.latent)] for stage in made.stages]


@pytest.mark.parametrize("name", PAPER)
def test_agrees_with_the_official_planner(name):
    with gzip.open(GOLDEN) as file:
        golden = json.load(file)
    assert len(golden) == 1168
    cases = [case for case in golden if case["scheme"] == name]
    assert len(cases) >= 162
    for case in cases:
        sizes = {key: case[key] for key in ("length", "window", "step")}
        known = [(0, case["observed"])] if case["observed"] else []
        assert windows(plan.make(SCHEMES[name], **sizes, given=known)) == case["stages"], (sizes, known)


@pytest.mark.slow
def test_the_oracle_agrees_with_the_official_planner():
    with gzip.open(GOLDEN) as file:
        golden = json.load(file)
    for case in golden[::5]:
        assert case["stages"] == paper_plan(
            case["scheme"], case["length"], case["window"], case["step"], case["observed"]
        )


@stable
@given(st.sampled_from(PAPER), st.data())
def test_agrees_with_the_slow_oracle(name, data):
    window = data.draw(st.integers(1, 24), "window")
    step = data.draw(st.integers(1, window), "step")
    length = data.draw(st.integers(1, 200), "length")
    known = data.draw(st.integers(0, length), "given")
    expected = paper_plan(name, length, window, step, known)
    made = plan.make(SCHEMES[name], length=length, window=window, step=step, given=[(0, known)] if known else [])
    check(made)
    if expected is not None:
        assert windows(made) == expected


def test_autoregressive_160():
    made = plan.make(SHIPPED["autoregressive"])
    assert (made.length, made.window, made.step, made.calls, made.waves, made.reach) == (160, 16, 8, 19, 19, 15)
    assert windows(made)[0] == [[], list(range(16))]
    assert windows(made)[18] == [list(range(144, 152)), list(range(152, 160))]


def test_a_first_window_in_pieces():
    """Each of them twice what is there, and looks at all of it; what follows is as it was."""
    whole, made = (plan.make(SHIPPED["autoregressive"], begin=begin) for begin in (None, 1))
    check(made)
    assert (whole.begin, made.begin) == (None, 1)
    assert windows(made)[:5] == [
        [[], [0]],
        [[0], [1]],
        [[0, 1], [2, 3]],
        [list(range(4)), list(range(4, 8))],
        [list(range(8)), list(range(8, 16))],
    ]
    assert windows(made)[5:] == windows(whole)[1:]
    assert (made.calls, made.waves) == (23, 23)


@stable
@given(st.sampled_from(sorted(SHIPPED)), st.data())
def test_pieces_are_those_of_the_first_window(name, data):
    window = data.draw(st.integers(1, 24), "window")
    length = data.draw(st.integers(1, 200), "length")
    begin = data.draw(st.integers(1, 30), "begin")
    known = givens.example(SHIPPED[name], length=length, window=window)
    try:
        whole = plan.make(SHIPPED[name], length=length, window=window, given=known)
    except BadInput:
        return
    made = plan.make(SHIPPED[name], length=length, window=window, given=known, begin=begin)
    check(made)
    if known or begin >= len(whole.stages[0].latent):
        assert (made.begin, windows(made)) == (None, windows(whole))
        return
    pieces = len(made.stages) - len(whole.stages) + 1
    assert [stage.latent for stage in made.stages[pieces:]] == [stage.latent for stage in whole.stages[1:]]
    latent = [len(stage.latent) for stage in made.stages[:pieces]]
    assert made.begin == latent[0] == begin
    assert all(count == sum(latent[: place + 1]) for place, count in enumerate(latent[1:-1]))
    assert sum((stage.latent for stage in made.stages[:pieces]), ()) == whole.stages[0].latent


def test_keyframes_160():
    made = plan.make(SHIPPED["keyframes"])
    check(made)
    assert (made.calls, made.waves) == (16, 2)


@pytest.mark.parametrize("window", [3, 4, 8, 16])
@pytest.mark.parametrize("length", [100, 1000, 20_000])
def test_waves_of_keyframes_grow_with_the_logarithm(length, window):
    made = plan.make(SHIPPED["keyframes"], length=length, window=window)
    assert made.waves <= 2 + math.ceil(math.log(length / window, window - 1))
    if length <= 1000:
        check(made)


def test_step_follows_the_window_unless_said():
    of = SHIPPED["autoregressive"]
    assert plan.make(of, window=10).step == 5
    assert plan.make(of, window=1).step == 1
    assert plan.make(of, window=10, step=3).step == 3
    assert plan.make(of, step=3).step == 3


def make_or_error(of: Scheme, size: tuple[int, int, int], known: list) -> BadInput | None:
    """Checks the plan, or that there is none for a reason that is told."""
    length, window, step = size
    try:
        made = plan.make(of, length=length, window=window, step=step, given=known)
    except BadInput as error:
        return error
    check(made)
    return None


sizes = st.integers(1, 24).flatmap(lambda k: st.tuples(st.integers(1, 150), st.just(k), st.integers(1, k)))


@st.composite
def spans(draw, length):
    """Given frames anywhere: a prefix, a suffix, both ends, every n-th, or scattered ranges."""
    kind = draw(st.sampled_from(["none", "first", "last", "ends", "every", "anywhere"]))
    count = draw(st.integers(1, max(1, length // 2)))
    if kind == "none":
        return []
    if kind == "every":
        return [range(draw(st.integers(0, length - 1)), length, count)]
    if kind == "anywhere":
        places = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=8))
        return [(place, min(length, place + draw(st.integers(1, 5)))) for place in places]
    return {"first": [(0, count)], "last": [(length - count, length)], "ends": [(0, count), (length - count, length)]}[
        kind
    ]


@settings(stable, max_examples=600)
@given(st.sampled_from(sorted(SHIPPED)), sizes, st.data())
@pytest.mark.slow
def test_any_shipped_scheme_is_legal_or_says_why_not(name, size, data):
    known = data.draw(spans(size[0]), "given")
    if make_or_error(SHIPPED[name], size, known):
        # Only these can be unable to go on: from given frames that stand elsewhere, or with none.
        assert known or SHIPPED[name].start is None or name == "single"
        assert SHIPPED[name].rounds[0].generate.rule != "spread"


@settings(stable, max_examples=300)
@given(st.sampled_from(sorted(set(SHIPPED) - {"single"})), sizes, st.data())
def test_given_frames_where_the_scheme_expects_them_always_work(name, size, data):
    length, window, step = size
    of = SHIPPED[name]
    count = data.draw(st.integers(1, length), "count")
    until = data.draw(st.integers(1, length - count), "until") if of.given == "ends" and count < length else 0
    if of.given == "ends" and not until:
        return
    check(plan.make(of, length=length, window=window, step=step, given=givens.place(of, count, length, until)))
    check(plan.make(of, length=length, window=window, step=step, given=givens.example(of, length=length)))


amounts = st.one_of(
    st.integers(1, 20), st.sampled_from(["half", "rest", "all"]), st.integers(1, 100).map(lambda n: f"{n}%")
)
ranges = st.one_of(
    st.integers(-10, 60),
    st.tuples(st.integers(-10, 60), st.integers(1, 20)).map(lambda pair: f"{pair[0]}:{pair[0] + pair[1]}"),
    st.sampled_from([":", "-4:", "::3", "0:8:2", ":-2"]),
)
generate_rules = st.one_of(
    st.sampled_from(["next", "previous", "spread", "gaps"]),
    st.integers(2, 16).map(lambda n: {"levels": n}),
    ranges.map(lambda item: {"frames": item}),
)
observe_rules = st.one_of(
    st.tuples(st.sampled_from(["before", "after", "between", "nearest", "latest", "origin", "spread"]), amounts).map(
        lambda pair: {pair[0]: pair[1]}
    ),
    st.sampled_from(["before", "after", "nearest", "latest", "origin"]),
    ranges.map(lambda item: {"frames": item}),
)


@st.composite
def user_schemes(draw):
    rounds = []
    for _ in range(draw(st.integers(1, 4))):
        observe = draw(st.lists(observe_rules, max_size=4))
        if draw(st.integers(0, 4)) == 0:
            observe.append({"diverse": draw(st.sampled_from(["half", "rest", 3]))})
        item = {"generate": draw(generate_rules), "observe": observe}
        if draw(st.booleans()):
            item["parallel"] = draw(st.booleans())
        if draw(st.integers(0, 3)) == 0:
            item["times"] = draw(st.integers(1, 3))
        if draw(st.integers(0, 3)) == 0:
            item["when"] = "given"
        rounds.append(item)
    rounds.append({"generate": draw(st.sampled_from(["gaps", "spread", "next"])), "observe": ["nearest"]})
    rounds.append({"generate": "next", "observe": ["before"]})
    rounds.append({"generate": "previous", "observe": ["after"]})
    data = {"given": draw(st.sampled_from(["first", "last", "ends", "spread", "closed"])), "rounds": rounds}
    if draw(st.booleans()):
        data["start"] = draw(st.sampled_from(["contiguous", "spread"]))
    return scheme.from_node(yaml_file.from_plain(data, "mine.yaml:1"), "mine")


@settings(stable, max_examples=300)
@given(user_schemes(), sizes, st.data())
@pytest.mark.slow
def test_any_user_scheme_is_legal_or_says_why_not(of, size, data):
    make_or_error(of, size, data.draw(spans(size[0]), "given"))


@pytest.mark.slow
@settings(stable, max_examples=1500)
@given(user_schemes(), sizes, st.data())
def test_any_user_scheme_is_legal_or_says_why_not_many(of, size, data):
    make_or_error(of, size, data.draw(spans(size[0]), "given"))


@pytest.mark.parametrize(
    ("rounds", "line", "says"),
    [
        ('generate: {frames: "0:40"}', 3, "24 latent frames do not fit into a window of 16"),
        ("generate: next\n    observe: [frames: 200]", 4, "frame 200 is outside"),
        ("generate: next\n    observe: [frames: -161]", 4, "frame -161 is outside"),
        ('generate: next\n    observe: [frames: "100:104"]', 3, "window 1 observes frame 100, which is not known"),
        ('generate: next\n    observe: [frames: "0:12"]', 3, "window 1, which makes frame 16: 12 observed and 8"),
        ('generate: {frames: "200:"}', 3, "range 200: holds no frame"),
        ("generate: next\n    times: 2", 1, "never makes frame 32 (128 of 160 frames remain)"),
        ("generate: previous", 1, "never makes frame 16"),
        ("generate: {levels: 2}\n    observe: [latest: all, frames: 0, frames: 1]", 3, "10 observed"),
    ],
)
def test_broken_invariants_name_the_line_the_stage_and_the_frame(rounds, line, says):
    of = user_scheme(f"start: contiguous\nrounds:\n  - {rounds}\n")
    with pytest.raises(BadInput) as caught:
        plan.make(of)
    assert says in caught.value.message
    assert caught.value.message.startswith(f"mine.yaml:{line}:")


@pytest.mark.parametrize(
    "bad",
    [
        {"length": 0},
        {"length": -1},
        {"length": 10**20},
        {"window": 0},
        {"window": 10**9},
        {"step": 0},
        {"step": 17},
        {"window": 4, "step": 5},
        {"given": [(0, 161)]},
        {"given": [(-1, 3)]},
        {"given": [(5, 5)]},
        {"given": [range(0)]},
    ],
)
def test_impossible_sizes(bad):
    with pytest.raises(BadInput):
        plan.make(SHIPPED["autoregressive"], **bad)


def test_diverse_hides_no_frame_that_cannot_be_observed():
    of = user_scheme('start: contiguous\nrounds:\n  - generate: next\n    observe: [frames: "10:12", diverse: rest]\n')
    with pytest.raises(BadInput, match="observes frame 10, which is not known by then"):
        plan.make(of, length=12, window=16, step=8, given=((0, 4),))


def test_a_plan_too_large_to_hold_is_refused_before_it_is_held(monkeypatch):
    with pytest.raises(BadInput, match="too large"):
        plan.make(SHIPPED["autoregressive"], length=100_000_000)
    monkeypatch.setattr(plan, "MAX_PLACES", 10_000)
    with pytest.raises(BadInput, match="too large"):
        plan.make(SHIPPED["autoregressive"], length=1000, step=1)


def test_schemes_that_need_given_frames_say_which():
    for name in ("prepend", "interpolate", "bridge"):
        with pytest.raises(BadInput, match="needs given frames") as caught:
            plan.make(SHIPPED[name])
        assert caught.value.hint
        option, _, text = caught.value.hint.partition(" ")
        assert option == "--given"
        check(plan.make(SHIPPED[name], given=givens.parse(text, 160)))


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("8", [(0, 8)]),
        ("0", []),
        ("0:8,152:160", [(0, 8), (152, 160)]),
        ("-8:", [(152, 160)]),
        ("::80", [(0, 1), (80, 81)]),
        ("0:8, 4:12", [(0, 12)]),
    ],
)
def test_given_as_typed(text, spans):
    assert list(givens.parse(text, 160)) == spans


@pytest.mark.parametrize("text", ["", "a", "161", "0:161", "200:", "8:8", "1:2:3:4", "0:8,,", "-3", "9" * 40, "1.5"])
def test_given_mistyped(text):
    with pytest.raises(BadInput):
        givens.parse(text, 160)


@stable
@given(st.integers(1, 100), st.data())
def test_given_frames_can_be_read_back(length, data):
    merged = givens.merge(data.draw(spans(length)), length)
    assert givens.parse(givens.as_typed(merged) or "0", length) == merged


def test_place_given():
    assert givens.place(SHIPPED["autoregressive"], 8, 160) == ((0, 8),)
    assert givens.place(SHIPPED["prepend"], 8, 160) == ((152, 160),)
    assert givens.place(SHIPPED["bridge"], 8, 160, until=4) == ((0, 8), (156, 160))
    assert givens.place(SHIPPED["interpolate"], 3, 9) == ((0, 1), (4, 5), (8, 9))
    with pytest.raises(BadInput, match="9 given frames do not fit"):
        givens.place(SHIPPED["autoregressive"], 9, 8)


def test_a_loop_sees_its_first_frames_after_the_last():
    made = plan.make(SHIPPED["loop"])
    last = made.stages[-1]
    assert last.latent[-1] == 159
    assert last.observed is not None
    assert made.positions(last, last.observed) == tuple(160 + f if f < 80 else f for f in last.observed)
    assert 160 in made.positions(last, last.observed)


@pytest.mark.parametrize(
    ("length", "given"), [(n, m) for n in (16, 17, 30, 48, 160) for m in (0, 1, 8, 15, 40, 47, 155) if m < n]
)
def test_a_loop_is_closed_whatever_is_given(length, given):
    made = plan.make(SHIPPED["loop"], length=length, given=[(0, given)] if given else [])
    last = made.stages[made.makers[length - 1]]
    assert last.observed is not None
    assert max(made.positions(last, last.observed), default=0) >= length


def test_a_choice_in_a_loop_may_reach_round_it():
    rounds = """
given: closed
start: contiguous
rounds:
  - generate: {frames: ["50:54", "96:100"]}
    observe: [before: 1, diverse: rest]
  - {generate: gaps, parallel: true, observe: [nearest: rest]}
"""
    made = plan.make(user_scheme(rounds), length=120)
    stage = next(stage for stage in made.stages if stage.choice is not None)
    places = [made.positions(stage, (frame,))[0] for frame in range(16)]
    assert max(*places, *stage.latent) - min(*places, *stage.latent) <= made.reach == 119


def test_run_time_choice_starts_from_the_nearest_frames():
    first, *_, last = plan.make(SHIPPED["adaptive-autoregressive"]).stages[1:]
    assert first.choice == plan.Choice(always=(15,), among=1)
    assert last.choice == plan.Choice(always=(151,), among=18)
    stage = plan.make(SHIPPED["adaptive-hierarchy-2"]).stages[2]
    assert stage.latent == (9, 11, 12, 13, 14, 15, 16, 17)
    assert stage.choice == plan.Choice(always=(7, 8, 10, 21), among=2)
    assert stage.observed_count == 8


def test_adaptive_schemes_make_the_same_frames():
    for name, adaptive in (
        ("autoregressive", "adaptive-autoregressive"),
        ("hierarchy-2", "adaptive-hierarchy-2"),
    ):
        plain, chosen = plan.make(SHIPPED[name]), plan.make(SHIPPED[adaptive])
        assert [stage.latent for stage in plain.stages] == [stage.latent for stage in chosen.stages]


MEASURE = """
import re, sys, time
from pathlib import Path
from fdm_cli import given as givens, plan, scheme
of = scheme.load(sys.argv[1])
def seconds(length):
    begin = time.process_time()
    made = plan.make(of, length=length, given=givens.example(of, length=length))
    sum(made.stages.observed_counts)
    return time.process_time() - begin
for _ in range(3):  # a busy machine may slow down half of a comparison
    few, many = seconds(100_000), seconds(1_000_000)
    if many <= 13 * few and many <= 10:
        break
# Not ru_maxrss: a child inherits it from the process that started it.
print(few, many, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SHIPPED) - {"single"}))
def test_a_million_frames(name):
    done = subprocess.run([sys.executable, "-c", MEASURE, name], capture_output=True, text=True, check=True)
    few, many, gigabytes = map(float, done.stdout.split())
    assert many <= 10
    assert many <= 13 * few
    assert gigabytes < 1
