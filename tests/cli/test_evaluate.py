import json
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fdm_cli.evaluate import STATISTICS
from tests.command import Command
from tests.conftest import fdm
from tests.reference import DATA


class Network(torch.nn.Module):
    """What an I3D looks like from outside."""

    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert return_features
        assert not rescale
        assert not resize
        return torch.nn.functional.adaptive_avg_pool3d(x, [1, 2, 2]).flatten(1)


FAST = ("--sampling-steps", 2, "--clips", 4, "--bound-timesteps", 3, "--length", 24, "--rollouts", 2)


@pytest.fixture
def evaluate(micro_weights, tmp_path):
    def run(*arguments, check=0):
        return fdm("evaluate", "--checkpoint", micro_weights, *FAST, *arguments, cwd=tmp_path, check=check)

    return run


@pytest.mark.slow
def test_everything(evaluate, tmp_path):
    done = evaluate("--futures", 3, "--scheme", "autoregressive", "--scheme", "bridge", "--json", "--plot", "a.png")
    found = json.loads(done.stdout)
    assert (found["window"], found["given"], found["clips"], found["sampling_steps"]) == (16, 8, 4, 2)
    prediction = found["prediction"]
    for name in ("model", "best", "copy_last", "mean_given"):
        assert len(prediction[name]["psnr"]) == len(prediction[name]["ssim"]) == len(prediction[name]["sharpness"]) == 8
        assert 0 < prediction[name]["psnr_all"] < 60
    assert prediction["best"]["psnr_all"] > prediction["model"]["psnr_all"]
    assert prediction["copy_last"]["psnr"][0] > prediction["copy_last"]["psnr"][7]  # digits move
    bound = found["bound"]
    assert bound["timesteps"] == [0, 500, 999]
    assert bound["total"] == pytest.approx(bound["prior"] + bound["divergence"] + bound["decoder"])
    assert bound["total"] > 0
    drift = found["drift"]
    assert (drift["length"], drift["rollouts"], drift["real_length"]) == (24, 2, 24)
    assert drift["fvd_unavailable"].startswith("needs --fvd-weights")
    assert list(drift["schemes"]) == ["autoregressive", "bridge"]
    for scheme in drift["schemes"].values():
        assert scheme["fvd"] is None
        assert scheme["seconds"] > 0
        for name in STATISTICS:
            assert len(scheme["frames"][name]) == 24
            figures = scheme[name]
            assert figures["ratio"] == pytest.approx(figures["last"] / figures["real"])
            assert (figures["first"] is None) == (name == "kept")  # of the frame 16 before, which these do not have
    assert drift["schemes"]["autoregressive"]["network_calls"] == 2 * 2
    # Given frames are real clips and no part of the figures.
    assert drift["schemes"]["bridge"]["first_frames"][0] > 0
    assert drift["schemes"]["bridge"]["frames"]["ink"][0] < 0.06
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 1800
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.slow
def test_a_part_as_a_table_is_the_same_again_and_for_any_batch(evaluate):
    first, again = (evaluate("--only", "prediction", *more).stdout for more in ((), ("--max-batch", 3)))
    assert first == again
    lines = first.splitlines()
    assert lines[0].endswith("on held-out clips of moving-mnist; dpm-solver++, 2 steps, seed 0")
    assert "PSNR (dB)" in first
    assert "copy of the last given frame" in first
    assert "bits per dimension" not in first
    assert "drift" not in first


@pytest.mark.slow
def test_options_of_parts_that_are_left_out_are_named(evaluate):
    done = evaluate("--only", "bound", "--guidance-rescale", 0.5)
    named = {line.split()[1] for line in done.stderr.splitlines() if line.startswith("warning: --")}
    assert named == {"--guidance-rescale", "--sampling-steps", "--length", "--rollouts"}


@pytest.mark.slow
def test_rescaled_guidance_predicts_something_else(evaluate):
    made = [
        json.loads(evaluate("--only", "prediction", "--guidance", 3, "--guidance-rescale", rescale, "--json").stdout)
        for rescale in (0, 1)
    ]
    assert [facts["guidance_rescale"] for facts in made] == [0, 1]
    assert made[0]["prediction"]["model"]["psnr"] != made[1]["prediction"]["model"]["psnr"]


@pytest.mark.slow
def test_what_is_done_is_shown_though_the_rest_is_stopped(micro_weights, tmp_path):
    process = Command(
        "evaluate", "--checkpoint", micro_weights, *FAST, "--only", "bound,drift", "--length", 48, cwd=tmp_path
    )
    said = ""
    while "drift of" not in said and process.poll() is None:
        said += process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert process.stderr.read().splitlines()[-1] == "error: terminated"
    assert "bits per dimension" in process.stdout.read()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_frechet_distance_with_a_network_and_without(evaluate, tmp_path):
    torch.jit.script(Network()).save(tmp_path / "i3d.pt")
    done = evaluate("--only", "drift", "--fvd-weights", "i3d.pt", "--json")
    assert "compare equal numbers" in done.stderr
    found = json.loads(done.stdout)
    assert (found["given"], found["clips"], found["futures"]) == (None, None, None)
    drift = found["drift"]
    assert drift["fvd_unavailable"] is None
    assert drift["schemes"]["autoregressive"]["fvd"] > 0
    table = evaluate("--only", "drift").stdout
    assert "Frechet video distance unavailable (needs --fvd-weights" in table


@pytest.mark.slow
def test_videos_of_the_user_that_are_shorter_than_a_rollout(evaluate, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "clips.npy", rng.integers(0, 255, (12, 21, 16, 16), np.uint8))
    done = evaluate("--data", "clips.npy", "--json", "-q")
    assert "no held-out clip has 24 frames: rollouts are compared with clips of 21" in done.stderr
    found = json.loads(done.stdout)
    assert found["data"] == "clips.npy"
    assert found["drift"]["real_length"] == 21
    assert np.mean(found["drift"]["real"]["ink"]) == pytest.approx(0.5, abs=0.02)
    done = evaluate("--data", "clips.npy", "--only", "drift", "--scheme", "bridge", check=2)
    assert done.stderr.splitlines()[-1].startswith("error: no held-out clip has 24 frames; the longest has 21")


@pytest.mark.slow
def test_other_data_need_only_fill_a_window(evaluate, tmp_path):
    for name, frames in (("long", 17), ("short", 15)):
        clips = np.random.default_rng(0).integers(0, 255, (12, frames, 16, 16), np.uint8)
        np.save(tmp_path / f"{name}.npy", clips)
    done = evaluate("--data", "long.npy", "--only", "prediction", "--clips", 3, "--json")
    assert json.loads(done.stdout)["prediction"]
    assert "1 held-out video has 2 windows of 16 frames, --clips 3 measures some of them again" in done.stderr
    done = evaluate("--data", "short.npy", "--only", "prediction", check=2)
    assert "no clip has the 16 frames" in done.stderr
    assert "hint: a held-out clip needs 16 frames here" in done.stderr


def test_other_data_that_is_the_training_s_by_another_name_is_split_as_in_training(evaluate, tmp_path):
    """Of 20 videos 10 are long enough to be trained on, so the 20th is held out, not the 19th and the 20th."""
    (tmp_path / "videos").mkdir()
    for number in range(20):
        value = 10 if number < 19 else 200
        np.save(tmp_path / "videos" / f"{number}.npy", np.full((17 if number < 10 else 40, 16, 16), value, np.uint8))
    done = evaluate("--data", "videos", "--only", "drift", "--json", "--rollouts", 1)
    assert json.loads(done.stdout)["drift"]["real"]["ink"][0] == pytest.approx(200 / 255)
    assert json.loads(done.stdout)["drift"]["real_videos"] == 1


@pytest.mark.slow
def test_what_is_refused_is_refused_before_anything_is_measured(evaluate, tmp_path):
    np.save(tmp_path / "clips.npy", np.zeros((12, 21, 16, 16), np.uint8))
    for arguments in (
        ("--bound-timesteps", 1001),
        ("--scheme", "autoregressive", "--scheme", "single"),
        ("--data", "clips.npy", "--scheme", "autoregressive", "--scheme", "bridge"),
    ):
        done = evaluate(*arguments, check=2)
        assert "network call" not in done.stderr


@pytest.mark.slow
def test_what_is_not_asked_for_fits_a_model_of_a_short_window(tmp_path):
    """Four frames, 40 timesteps."""
    arguments = ("--only", "prediction,bound", "--clips", 2, "--sampling-steps", 2, "--json")
    found = json.loads(fdm("evaluate", "--checkpoint", DATA / "seed-micro.pt", *arguments, cwd=tmp_path).stdout)
    assert (found["window"], found["given"], len(found["bound"]["timesteps"])) == (4, 2, 25)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--only", "predicton"), "unknown part 'predicton'"),
        (("--given", "16"), "16 given frames of a window of 16"),
        (("--scheme", "loop", "--scheme", "loop"), "two of the name loop"),
        (("--only", "bound", "--bound-timesteps", "1001"), "the model's process has 1000"),
        (("--only", "drift", "--scheme", "single"), "single"),
        (("--data", "missing"), "no such file: missing"),
        (("--fvd-weights", "missing.pt"), "no such file: missing.pt"),
        (("--plot", "a.gif"), "does not end in .png"),
        (("--plot", "a.png", "--only", "bound"), "--only leaves out both"),
        (("--plot", "a.png", "--only", "bound,bound"), "--only leaves out both"),
        (("--only", "prediction", "--memory-budget", "1MB"), "of memory"),
    ],
)
@pytest.mark.slow
def test_bad_usage(evaluate, tmp_path, arguments, says):
    done = evaluate(*arguments, check=2)
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert says in error
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
