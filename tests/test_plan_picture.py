import numpy as np
import pytest

from fdm_cli import plan, plan_picture, scheme


def cell(picture, made, row, frame):
    """The colour in the middle of a cell; `row` counts the row of the given frames too."""
    rows = made.calls + bool(made.given)
    high = (picture.shape[0] - plan_picture._TOP - plan_picture._BOTTOM) // rows
    wide = max(2, min(36, plan_picture._WIDTH // made.length))
    y = plan_picture._TOP + row * high + high // 2
    return tuple(picture[y, plan_picture._LEFT + frame * wide + wide // 2])


def test_every_frame_has_its_colour():
    made = plan.make(scheme.load("adaptive-autoregressive"), length=40, given=[(0, 8)])
    picture = plan_picture.draw(made)
    assert picture.dtype == np.uint8
    assert cell(picture, made, 0, 7) == plan_picture.KNOWN
    assert cell(picture, made, 0, 8) == plan_picture.UNKNOWN
    assert cell(picture, made, 1, 7) == plan_picture.OBSERVED
    assert cell(picture, made, 1, 8) == plan_picture.LATENT
    assert cell(picture, made, 1, 16) == plan_picture.UNKNOWN
    assert cell(picture, made, 2, 3) == plan_picture.CANDIDATE
    assert cell(picture, made, 2, 15) == plan_picture.OBSERVED


@pytest.mark.parametrize(
    ("name", "length", "given"),
    [("single", 1, ()), ("autoregressive", 8, [(0, 8)]), ("keyframes", 30_000, ()), ("autoregressive", 30_000, ())],
)
def test_any_plan_fits_a_page(name, length, given):
    height, width, _ = plan_picture.draw(plan.make(scheme.load(name), length=length, given=given)).shape
    assert height <= 1200
    assert width <= 1500
