"""The model that comes with the package, and what its card says of it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from fdm_cli.checkpoint import load_checkpoint
from fdm_cli.cli.options import BUNDLED_MODEL, BUNDLED_SHIFT, spacing
from fdm_cli.config import load_preset
from fdm_cli.dataset import open_clips
from fdm_cli.device import choose_device
from fdm_cli.trainer import Trainer
from tests.conftest import ROOT, fdm

CARD = (BUNDLED_MODEL.parent / "MODEL-CARD.md").read_text(encoding="utf-8")
PRESET = load_preset("moving-mnist-small")


@pytest.mark.slow
def test_the_card_is_about_this_file():
    checkpoint = load_checkpoint(BUNDLED_MODEL)
    assert checkpoint.sha256 in CARD
    assert f"{sum(parameter.numel() for parameter in checkpoint.model.parameters()):,} parameters" in CARD
    assert BUNDLED_MODEL.stat().st_size <= 10_000_000
    assert (checkpoint.config.model, checkpoint.config.diffusion) == (PRESET.model, PRESET.diffusion)
    # In the last leg windows no longer grew: those of the legs before had got to their full length.
    grown = {"first_clip_length": PRESET.data.first_clip_length, "growth_steps": PRESET.data.growth_steps}
    assert replace(checkpoint.config.data, **grown) == PRESET.data
    assert checkpoint.clip_length == PRESET.data.clip_length == 160


@pytest.mark.slow
def test_its_training_can_be_retraced():
    losses = [float(loss) for loss in re.findall(r"\b\d\.\d{4}\b", CARD.split("## The first 100 losses")[1])]
    assert len(losses) == 100
    without = ["model.draft=none", "model.patch_attention=none", "training.observed_blur=0"]
    first_leg = load_preset("moving-mnist-small", ["data.masks=filled", "training.optimizer=adamw", *without])
    trainer = Trainer(first_leg, open_clips(first_leg), choose_device("cpu", threads=1))
    assert [trainer.train_step()[0] for _ in range(4)] == pytest.approx(losses[:4], abs=2e-4)


@pytest.mark.slow
def test_it_predicts_better_than_the_last_frame_and_as_sharp_as_the_true_ones(tmp_path):
    done = fdm("evaluate", "--only", "prediction", "--clips", 8, "--sampling-steps", 5, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)["prediction"]
    assert found["model"]["psnr"][0] > found["copy_last"]["psnr"][0] + 2
    assert 0.7 < found["model"]["sharpness"][0] < 1.4


@pytest.mark.slow
def test_evaluate_takes_it_too(tmp_path):
    done = fdm("evaluate", "--only", "prediction", "--clips", 2, "--sampling-steps", 2, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["checkpoint"] == str(BUNDLED_MODEL)
    assert "bundled moving-mnist-small" in done.stderr


def test_named_by_its_path_it_is_sampled_as_it_is_without():
    assert spacing(None, None, "dpm-solver++") == spacing(None, BUNDLED_MODEL, "dpm-solver++") == BUNDLED_SHIFT
    assert spacing(None, BUNDLED_MODEL.with_name("other.pt"), "dpm-solver++") == 1
    assert spacing(None, None, "ancestral") == 1, "all timesteps are all timesteps"
    assert spacing(2.0, None, "ancestral") == 2


@pytest.mark.parametrize("command", [("sample",), ("extend", ROOT / "tests/data/two-digits.gif")])
@pytest.mark.slow
def test_it_is_what_is_used_when_no_checkpoint_is_given(command, tmp_path):
    done = fdm(*command, "--length", 18, "--sampling-steps", 2, "--seed", 1, "-o", "out.npz", "--json", cwd=tmp_path)
    assert [line for line in done.stderr.splitlines() if "bundled" in line] == [
        "no --checkpoint: the bundled moving-mnist-small, digits of 32 x 32 pixels"
    ]
    result = json.loads(done.stdout)
    assert (result["checkpoint"], result["frames"]) == (str(BUNDLED_MODEL), 18)
    settings = (result["guidance"], result["guidance_rescale"], result["timestep_shift"])
    assert settings == (1, 0, BUNDLED_SHIFT)
    assert np.load(tmp_path / "out.npz")["frames"].shape == (18, 32, 32, 1)
