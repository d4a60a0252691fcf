"""Runs of the real command: waiting for them, and comparing what they leave."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from fdm_cli.run_folder import RunFolder


def wait_for(condition: Callable[[], bool]) -> None:
    """Looks again and again; fails after four minutes."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def newest(run: Path) -> dict:
    """What its newest checkpoint holds."""
    state, remarks = RunFolder(run).newest_state()
    assert remarks == []
    return state


def assert_same(run: Path, other: Path) -> None:
    """Weights, EMA and optimizer of the newest checkpoints are equal bit for bit."""
    mine, others = newest(run), newest(other)
    assert mine["step"] == others["step"]
    for part in ("model", "ema"):
        for key, value in mine[part].items():
            assert torch.equal(value, others[part][key]), key
    for key, moments in mine["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, others["optimizer"]["state"][key][name])
