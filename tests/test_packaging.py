"""What is installed holds everything, however it is installed."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_wheel_made_from_the_sdist_is_complete_and_works(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for folder, inside in (("fdm_cli/presets", "fdm_cli/presets"), ("fdm_cli/assets", "fdm_cli/assets")):
        assert {f"{inside}/{file.name}" for file in (ROOT / folder).iterdir() if file.is_file()} <= names
    assert {f"fdm_cli/schemes/{file.name}" for file in (ROOT / "schemes").glob("*.yaml")} <= names
    assert "fdm_cli/py.typed" in names
    assert not any(name.startswith("tests/") for name in names)

    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}

    def run(code: str) -> str:
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    assert str(tmp_path) in run("import fdm_cli; print(fdm_cli.__file__)")
    assert "autoregressive" in run("from fdm_cli import scheme; print(scheme.names())")
    assert "micro" in run("from fdm_cli import config; print(config.preset_names())")
    assert "10000" in run("from fdm_cli.moving_mnist import built_in_digits; print(built_in_digits().shape)")
    assert "autoregressive 160" in run(
        "from fdm_cli import scheme; found = scheme.load('autoregressive'); print(found.name, found.length)"
    )
