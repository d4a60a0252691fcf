import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fdm_cli import plan, scheme
from fdm_cli.scheme import Generate, Scheme

GOLDEN = Path(__file__).parent / "data" / "plans.json.gz"


def hierarchy(levels: int) -> Scheme:
    first, deeper = scheme.load("hierarchy-3").rounds
    deeper = replace(deeper, generate=Generate("levels", levels=levels))
    return replace(scheme.load("hierarchy-3"), name=f"hierarchy-{levels}", rounds=(first, deeper))


SCHEMES = {name: scheme.load(name) for name in scheme.names()} | {"hierarchy-4": hierarchy(4)}


def windows(made: plan.Plan) -> list[list[list[int]]]:
    return [[list(stage.observed or ()), list(stage.latent)] for stage in made.stages]


@pytest.mark.parametrize("name", ["autoregressive", "long-range", "hierarchy-2", "hierarchy-3", "hierarchy-4"])
def test_agrees_with_the_official_planner(name):
    with gzip.open(GOLDEN) as file:
        golden = json.load(file)
    assert len(golden) == 1168
    cases = [case for case in golden if case["scheme"] == name]
    assert len(cases) >= 162
    for case in cases:
        sizes = {key: case[key] for key in ("length", "window", "step")}
        given = [(0, case["observed"])] if case["observed"] else []
        assert windows(plan.make(SCHEMES[name], **sizes, given=given)) == case["stages"], (sizes, given)


def test_autoregressive_160():
    made = plan.make(SCHEMES["autoregressive"])
    assert (made.length, made.window, made.step, made.calls, made.waves, made.reach) == (160, 16, 8, 19, 19, 15)
    assert windows(made)[0] == [[], list(range(16))]
    assert windows(made)[18] == [list(range(144, 152)), list(range(152, 160))]
