"""Every shipped scheme, executed: the stages are those that `inspect-scheme` shows."""

import json

import numpy as np
import pytest

from fdm_cli import scheme
from tests.conftest import fdm

pytestmark = pytest.mark.slow


@pytest.fixture
def clips(tmp_path):
    """Two clips of eight frames."""
    generator = np.random.default_rng(0)
    for name in ("clip", "other"):
        np.savez(tmp_path / f"{name}.npz", frames=generator.integers(0, 256, (8, 16, 16, 1), np.uint8), fps=12.5)


@pytest.mark.usefixtures("clips")
@pytest.mark.parametrize("name", scheme.names())
def test_executed_stages_equal_inspect_scheme_s(micro_weights, tmp_path, name):
    length = 16 if name == "single" else 160
    loaded = scheme.load(name)
    command = ["sample"] if loaded.start is not None else ["extend", "clip.npz"]
    if loaded.given == "ends":
        command += ["--until", "other.npz"]
    options = ("--scheme", name, "--length", length, "--sampling-steps", 1, "--seed", 3, "-q", "-o", "video.npz")
    fdm(*command, "--checkpoint", micro_weights, *options, cwd=tmp_path)
    report = json.loads((tmp_path / "video.npz.json").read_text())
    with np.load(tmp_path / "video.npz") as arrays:
        assert arrays["frames"].shape == (length, 16, 16, 1)
    given = ",".join(f"{start}:{stop}" for start, stop in report["given"])
    assert bool(given) == (command[0] == "extend")
    asked = ("--given", given) if given else ("--given", "0")
    shown = json.loads(fdm("inspect-scheme", name, "--length", length, *asked, "--json").stdout)
    assert len(report["stages"]) == shown["calls"]
    for made, planned in zip(report["stages"], shown["stages"], strict=True):
        if planned["observed"] is None:  # chosen while it ran
            assert len(set(made["observed"])) == planned.pop("observed_count")
            planned["observed"] = made["observed"]
        assert made == planned
