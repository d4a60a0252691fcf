import numpy as np
import pytest

from fdm_cli.curve_picture import BOTTOM, HEIGHT, LEFT, PAPER, RIGHT, TOP, WIDTH, Curve, draw

RED, BLUE = (200, 0, 0), (0, 0, 200)


def places(picture, colour):
    """Rows and columns of the plot's pixels of a colour, legend left out."""
    rows, columns = np.nonzero((picture[TOP:] == colour).all(-1))
    return rows + TOP, columns


def test_a_curve_runs_from_corner_to_corner_on_a_logarithmic_scale():
    picture = draw([Curve("a", [(x, 10.0**-x) for x in range(5)], RED)], "step")
    assert picture.shape == (HEIGHT, WIDTH, 3)
    rows, columns = places(picture, RED)
    assert columns.min() <= LEFT + 2
    assert columns.max() >= WIDTH - RIGHT - 2
    # Falling tenfold a unit is a straight line here.
    middle = rows[np.abs(columns - (LEFT + WIDTH - RIGHT) / 2) < 1].mean()
    assert middle == pytest.approx((TOP + HEIGHT - BOTTOM) / 2, abs=4)
    assert rows[columns == columns.min()].mean() < middle < rows[columns == columns.max()].mean()


def test_on_a_linear_scale_what_rises_evenly_is_straight_and_may_be_negative():
    picture = draw([Curve("a", [(x, x - 3.0) for x in range(5)], RED)], "frame", "height", linear=True)
    rows, columns = places(picture, RED)
    assert columns.min() <= LEFT + 2
    assert columns.max() >= WIDTH - RIGHT - 2
    middle = rows[np.abs(columns - (LEFT + WIDTH - RIGHT) / 2) < 1].mean()
    assert middle == pytest.approx((TOP + HEIGHT - BOTTOM) / 2, abs=4)
    unnamed = draw([Curve("a", [(x, x - 3.0) for x in range(5)], RED)], "frame", linear=True)
    assert (picture[TOP:] == unnamed[TOP:]).all()
    assert (picture[:TOP] != unnamed[:TOP]).any()


def test_what_is_not_a_number_leaves_a_gap():
    values = [1.0, 1.0, float("nan"), 0.1, 0.1]
    rows, _ = places(draw([Curve("a", list(enumerate(values)), BLUE)], "step"), BLUE)
    assert rows.max() - rows.min() > 100
    assert not ((rows > rows.min() + 10) & (rows < rows.max() - 10)).any()


@pytest.mark.parametrize(
    "points", [[], [(7, 0.5)], [(1, 0.3), (2, 0.3)], [(1, 1e-9), (10**7, 1e9)], [(1, float("inf"))]]
)
@pytest.mark.parametrize("linear", [False, True])
def test_any_points_can_be_drawn(points, linear):
    picture = draw([Curve("a", points, RED, dots=True), Curve("b", [], BLUE)], "step", linear=linear)
    assert (picture != PAPER).any()
    assert bool(len(places(picture, RED)[0])) == any(np.isfinite(y) for _, y in points)


def test_many_names_take_more_lines_and_none_is_cut_off():
    few, many = (
        draw([Curve("a name of some length", [(0, 1.0), (1, 0.5)], (50 + n, 0, 0)) for n in range(count)], "step")
        for count in (1, 9)
    )
    grey = (225, 228, 233)
    tops = [int(np.nonzero((picture == grey).all(-1))[0].min()) for picture in (few, many)]
    assert tops[1] > tops[0]
    for number in range(9):
        _, columns = np.nonzero((many[: tops[1]] == (50 + number, 0, 0)).all(-1))
        assert len(columns) >= 24, number
        assert columns.max() < WIDTH - RIGHT
