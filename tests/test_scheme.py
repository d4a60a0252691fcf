import random
from pathlib import Path

import pytest

from fdm_cli import given as givens
from fdm_cli import plan, scheme, yaml_file
from fdm_cli.errors import BadInput
from fdm_cli.scheme import Amount, FrameRange, Scheme
from tests import scheme_guide

SHIPPED = [
    "adaptive-autoregressive",
    "adaptive-hierarchy-2",
    "autoregressive",
    "bridge",
    "hierarchy-2",
    "hierarchy-3",
    "interpolate",
    "keyframes",
    "long-range",
    "loop",
    "prepend",
    "single",
]


def read(text: str) -> Scheme:
    return scheme.from_node(yaml_file.parse(text, "mine.yaml"), "mine")


def test_what_is_shipped():
    assert scheme.names() == SHIPPED
    for name in SHIPPED:
        of = scheme.load(name)
        assert of.name == name
        assert of.about
        assert of.about.endswith(".")


def test_the_guide_tells_the_truth():
    written = (scheme.folder() / "README.md").read_text(encoding="utf-8")
    assert written == scheme_guide.guide(), "run: python -m tests.scheme_guide"


def test_the_guide_shows_every_rule():
    assert [rule for rule, *_ in scheme_guide.GENERATE] == list(scheme._GENERATE)
    assert sorted(rule for rule, *_ in scheme_guide.OBSERVE) == sorted(scheme._OBSERVE)


def test_defaults():
    of = read("rounds: [{generate: next}]")
    assert (of.name, of.length, of.window, of.step, of.given, of.start) == ("mine", 160, 16, 8, "first", None)
    assert read("window: 5\nrounds: [{generate: next}]").step == 2


def test_a_file_by_its_path(tmp_path, monkeypatch):
    text = "start: contiguous\nrounds: [{generate: next, observe: [before]}]\n"
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "plain").write_text(text)
    (tmp_path / "autoregressive").write_text("nonsense: 1")
    monkeypatch.chdir(tmp_path)
    assert scheme.load(str(tmp_path / "mine.yaml")).name == "mine"
    assert scheme.load("mine.yaml").name == "mine"
    assert scheme.load("plain").name == "plain"
    assert scheme.load("autoregressive").rounds


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hierachy-2", "did you mean 'hierarchy-2'?"),
        ("keyframe.yaml", "did you mean 'keyframes'?"),
        ("xyz", "known: adaptive-autoregressive, "),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(name, hint):
    with pytest.raises(BadInput, match="no scheme") as caught:
        scheme.load(name)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)


def test_amounts_and_ranges():
    of = read(
        "rounds:\n  - generate: next\n    observe:\n"
        '      [before: 3, after: half, origin: "25%", nearest: rest, latest: all, spread, frames: ["::2", -1]]\n'
    )
    rules = of.rounds[0].observe
    assert [rule.amount for rule in rules[:6]] == [
        Amount("count", 3),
        Amount("share", 50),
        Amount("share", 25),
        Amount("rest"),
        Amount("all"),
        Amount("rest"),
    ]
    every_other, last = rules[6].ranges
    assert list(every_other.frames(5)) == [0, 2, 4]
    assert list(last.frames(5)) == [4]
    assert str(FrameRange(None, -2, 3, "")) == ":-2:3"


@pytest.mark.parametrize(
    ("text", "line", "says", "hint"),
    [
        ("rouds: []", 1, "unknown key 'rouds'", "'rounds'"),
        ("name: a\nname: b", 2, "duplicate key", None),
        ("- next", 1, "must be a mapping", None),
        ("length: 160", 1, "needs rounds, or a start", "rounds"),
        ("length: 0\nstart: spread", 1, "length must be from 1", None),
        ("length: -5\nstart: spread", 1, "length must be from 1", None),
        ("length: 99999999999999\nstart: spread", 1, "length must be from 1", None),
        ("length: 1.5\nstart: spread", 1, "whole number", None),
        ("length: .nan\nstart: spread", 1, "finite", None),
        ("length: true\nstart: spread", 1, "whole number", None),
        ("window: 8\nstep: 9\nstart: spread", 2, "step 9 is larger", None),
        ("start: contigous", 1, "unknown 'contigous'", "'contiguous'"),
        ("given: [first]\nstart: spread", 1, "unknown a list", "first"),
        ("name: 3\nstart: spread", 1, "name must be text", "quotes"),
        ('name: "\\e[31m"\nstart: spread', 1, "printable", None),
        ("rounds: next", 1, "rounds must be a list", None),
        ("rounds:\n  - observe: []", 2, "needs a generate rule", "next"),
        ("rounds:\n  - generate: nxt", 2, "unknown 'nxt'", "'next'"),
        ("rounds:\n  - generate: {nxt: 3}", 2, "unknown key 'nxt'", "'next'"),
        ("rounds:\n  - generate: {next: 3}", 2, "takes no value", "generate: next"),
        ("rounds:\n  - generate: levels", 2, "needs a value", "levels: 2"),
        ("rounds:\n  - generate: {levels: 1}", 2, "from 2 to 16", None),
        ("rounds:\n  - generate: {levels: 2, gaps: 1}", 2, "one rule at a time", None),
        ("rounds:\n  - generate: next\n    paralel: true", 3, "unknown key 'paralel'", "'parallel'"),
        ("rounds:\n  - generate: next\n    parallel: yes", 3, "true or false", None),
        ("rounds:\n  - generate: next\n    when: start", 3, "unknown 'start'", "given"),
        ("rounds:\n  - generate: next\n    times: 0", 3, "times must be from 1", None),
        ("rounds:\n  - generate: next\n    observe: before", 3, "observe must be a list", None),
        ("rounds:\n  - generate: next\n    observe:\n      - befor: 1", 4, "unknown key 'befor'", "'before'"),
        ("rounds:\n  - generate: next\n    observe:\n      - befor", 4, "unknown 'befor'", "'before'"),
        ("rounds:\n  - generate: next\n    observe:\n      - before: 0", 4, "before must be from 1", None),
        ("rounds:\n  - generate: next\n    observe:\n      - before: hlaf", 4, "an amount is", "'half'"),
        ("rounds:\n  - generate: next\n    observe:\n      - before: 0%", 4, "an amount is", None),
        ("rounds:\n  - generate: next\n    observe:\n      - before: 101%", 4, "an amount is", None),
        ("rounds:\n  - generate: next\n    observe:\n      - before: [1]", 4, "an amount is", None),
        ("rounds:\n  - generate: next\n    observe: [diverse, before]", 3, "nothing can follow diverse", "last"),
        ("rounds:\n  - generate: next\n    observe: [diverse: all]", 3, "cannot take all", None),
        ("rounds:\n  - generate: next\n    observe: [frames]", 3, "needs a value", None),
        ("rounds:\n  - generate: {frames: []}", 2, "names no frame", None),
        ("rounds:\n  - generate: {frames: 1.5}", 2, "start:stop:step", "first 16"),
        ("rounds:\n  - generate: {frames: '0:8:0'}", 2, "at least 1", None),
        ("rounds:\n  - generate: {frames: '0:8:-1'}", 2, "start:stop:step", None),
        ("rounds: &a\n  - generate: next", 1, "anchors", None),
        ("rounds: [" + "{generate: next}, " * 101 + "]", 1, "more than 100 rounds", None),
        ("rounds:\n  - generate: next\n    observe: [" + "after, " * 33 + "]", 3, "more than 32 rules", None),
        ("rounds:\n  - generate: {frames: [" + "0, " * 101 + "]}", 2, "more than 100 ranges", "0:100:2"),
        ("window: 4097\nstart: spread", 1, "window must be from 1 to 4096", None),
        (f"name: {'x' * 61}\nstart: spread", 1, "at most 60 characters", None),
    ],
)
def test_mistakes_are_told_with_file_line_and_hint(text, line, says, hint):
    with pytest.raises(BadInput) as caught:
        read(text)
    assert says in caught.value.message
    assert caught.value.message.startswith(f"mine.yaml:{line}:")
    if hint:
        assert caught.value.hint is not None
        assert hint in caught.value.hint


@pytest.mark.slow
def test_mutated_files_never_crash():
    letters = random.Random(0)
    for name in SHIPPED:
        text = (scheme.folder() / f"{name}.yaml").read_text()
        for _ in range(30):
            at = letters.randrange(len(text))
            mutant = text[:at] + letters.choice("abc019:-{}[]&*!%\"'\n \t") + text[at + letters.randrange(3) :]
            try:
                of = read(mutant)
                plan.make(of, given=givens.example(of))
            except BadInput as error:
                assert error.message  # noqa: PT017


SEED = """
sampling_scheme:
  target: video_diffusion.samplers.schemes.Autoregressive
  params: {video_length: 80, max_frames: 8, num_observed_frames: %d, step_size: 2}
"""


def test_the_seeds_own_form(tmp_path):
    path = tmp_path / "autoregressive.yaml"
    path.write_text(SEED % 0)
    made = plan.make(scheme.load(str(path)))
    assert (made.length, made.window, made.step, made.calls) == (80, 8, 2, 37)
    same = plan.make(scheme.load("autoregressive"), length=80, window=8, step=2)
    assert list(made.stages) == list(same.stages)
    path.write_text(SEED % 4)
    with pytest.raises(BadInput, match="needs given frames"):
        plan.make(scheme.load(str(path)))
    assert plan.make(scheme.load(str(path)), given=[(0, 4)]).calls == 38


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("Autoregressive", "Autoregresive", "unknown scheme class"),
        ("step_size", "step", "unknown key 'step'"),
        ("step_size: 2", "step_size: 9", "larger than max_frames"),
        ("max_frames: 8", "max_frames: 5000", "max_frames must be from 1 to 4096"),
        ("params", "parms", "unknown key 'parms'"),
        ("sampling_scheme:", "rounds: []\nsampling_scheme:", "unknown key 'rounds'"),
    ],
)
def test_mistakes_in_the_seeds_form(old, new, says):
    with pytest.raises(BadInput, match=says):
        read((SEED % 0).replace(old, new))


def test_the_pictures_are_those_of_the_plans():
    import numpy as np
    from imageio import v3 as imageio

    from fdm_cli import plan_picture

    assert sorted(path.stem for path in (scheme.folder() / "pictures").iterdir()) == SHIPPED
    for name in SHIPPED:
        stored = np.asarray(imageio.imread(Path(scheme.folder() / "pictures" / f"{name}.png")))
        drawn = plan_picture.draw(scheme_guide.picture_plan(name))
        assert stored.shape == drawn.shape, "run: python -m tests.scheme_guide"
        cells = slice(plan_picture._TOP, -plan_picture._BOTTOM), slice(plan_picture._LEFT, -plan_picture._RIGHT)
        assert np.array_equal(stored[cells], drawn[cells]), "run: python -m tests.scheme_guide"
