import pytest

from fdm_cli.ticks import round_step


@pytest.mark.parametrize(
    ("least", "step"),
    [(1, 1), (2, 2), (3, 5), (5, 5), (6, 10), (1000, 1000), (1001, 2000), (0.3, 0.5), (0.07, 0.1), (999, 1000)],
)
def test_a_step_is_the_next_round_number(least, step):
    assert round_step(least) == pytest.approx(step)
