import errno
import json
import os
import re
import shutil
import signal
from io import StringIO

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

from fdm_cli import data_files
from fdm_cli.clip_cache import ClipCache
from fdm_cli.errors import RunFailed
from fdm_cli.run_folder import RunFolder
from tests.command import ROOT, Command
from tests.conftest import fdm
from tests.runs import assert_same, wait_for

pytestmark = pytest.mark.slow

MICRO = ("train", "--preset", "micro", "--steps", 6, "--set", "training.checkpoint_every=2", "--set",
         "model.dropout=0.1", "--seed", 3)  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    done = fdm(*MICRO, "--run", run, "--json", anew=True)
    result = json.loads(done.stdout)
    assert result["step"] == 6
    assert result["seed"] == 3
    assert result["checkpoint"] == str(run / "checkpoints" / "step-00000006.pt")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert result["loss"] == pytest.approx(sum(losses) / 6, rel=0.01)  # of so short a run, all steps count about alike
    return run


def test_the_run_folder(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(0 < line["loss"] < 10 for line in lines)
    assert sorted(file.name for file in (straight / "checkpoints").iterdir()) == [
        f"step-0000000{step}.pt" for step in (2, 4, 6)
    ]
    assert yaml.safe_load((straight / "config.yaml").read_text())["training"]["seed"] == 3


def test_one_seed_gives_identical_weights(straight, tmp_path):
    fdm(*MICRO, "--run", tmp_path / "run", "--quiet")
    assert_same(tmp_path / "run", straight)


def test_a_processor_that_is_slow_in_half_precision_is_named(tmp_path):
    short = (*MICRO[:3], "--steps", 1, "--quiet", "--precision")
    for precision, warned in (("bf16", True), ("fp32", False)):
        done = fdm(*short, precision, "--run", tmp_path / precision, anew=True, ATEN_CPU_CAPABILITY="avx2")
        assert ("computes bf16 in software" in done.stderr) == warned


def test_resume_takes_the_run_s_own_configuration(straight, tmp_path):
    run = tmp_path / "run"
    fdm(*MICRO[:3], "--steps", 2, *MICRO[5:], "--run", run, "--quiet")
    fdm("train", "--run", run, "--resume", "--steps", 6, "--quiet")
    assert_same(run, straight)
    done = fdm("train", "--run", run, "--resume", "--set", "training.learning_rate=0.5", check=2)
    assert "another training.learning_rate" in done.stderr
    done = fdm("train", "--run", run, "--resume", "--set", "training.accumulation=4", "--precision", "fp32")
    assert "accumulation: 4" in (run / "config.yaml").read_text()
    done = fdm("train", "--preset", "moving-mnist-small", "--run", run, "--resume", check=2)
    assert "hint: without --preset it goes on as it was begun" in done.stderr
    # The preset's own number of steps is not an option that was given.
    done = fdm("train", "--preset", "micro", *MICRO[5:], "--run", run, "--resume")
    assert "is at step 6 already" in done.stderr
    assert "steps: 6" in (run / "config.yaml").read_text()
    assert "done in" not in done.stderr
    mine = tmp_path / "mine.yaml"
    mine.write_text((run / "config.yaml").read_text().replace("steps: 6", "steps: 9"))
    done = fdm("train", "--config", mine, "--run", run, "--resume")
    assert f"keeps its training.steps, 6: {mine} says 9, which takes --set" in done.stderr
    done = fdm("train", "--run", run, "--resume", "--steps", 3, check=2)
    assert "is at step 6 already, beyond 3" in done.stderr
    assert "steps: 6" in (run / "config.yaml").read_text()


def test_a_passing_error_of_reading_sets_no_checkpoint_aside(straight, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(straight, run.path)

    def fails(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(RunFailed, match="Stale file handle"):
        run.newest_state()


def test_resume_takes_steps_whatever_spaces_stand_around_them(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    done = fdm("train", "--run", run, "--resume", "--set", "training.steps = 7", "--json")
    assert json.loads(done.stdout)["step"] == 7


def test_what_is_edited_in_a_run_is_said(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"ema_decay: [\d.]+", "ema_decay: 0.5", settings))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "loss": 1e999, "held_out_loss": "abc"}\n')
    done = fdm("train", "--run", run, "--resume", "--steps", 7)
    assert "warning: training.ema_decay is 0.5 from here on, by config.yaml; it was 0.9" in done.stderr


def test_a_refused_run_leaves_nothing_in_a_folder_that_was_there(tmp_path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "notes.txt").write_text("mine")
    fdm(*MICRO, "--data", "missing.npy", "--run", "exp", cwd=tmp_path, check=2)
    assert [entry.name for entry in (tmp_path / "exp").iterdir()] == ["notes.txt"]
    (tmp_path / "exp" / "notes.txt").rename(tmp_path / "exp" / "checkpoints")
    done = fdm(*MICRO, "--run", "exp", cwd=tmp_path, check=2)
    assert "cannot use exp/checkpoints: File exists" in done.stderr
    assert [entry.name for entry in (tmp_path / "exp").iterdir()] == ["checkpoints"]


def test_a_run_may_not_lie_in_its_data_s_folder_itself(tmp_path):
    np.save(tmp_path / "clips.npy", np.zeros((2, 20, 16, 16, 1), np.uint8))
    done = fdm(*MICRO, "--data", ".", "--run", tmp_path, cwd=tmp_path, check=2)
    assert "--run and --data are one folder" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["clips.npy"]


def test_a_damaged_newest_checkpoint_is_passed_over(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    newest = run / "checkpoints" / "step-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    done = fdm("train", "--run", run, "--resume")
    assert "warning" in done.stderr
    assert_same(run, straight)


def test_an_unreadable_checkpoint_does_not_count_as_the_newest(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    older, newest = RunFolder(run).checkpoints()[-2:]
    newest.write_bytes(newest.read_bytes()[:1000])
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"keep_checkpoints: \d+", "keep_checkpoints: 1", settings))
    step = int(older.stem.removeprefix("step-")) + 1
    result = fdm("train", "--run", run, "--resume", "--steps", step).stdout.strip()
    assert result.endswith(f"step-{step:08d}.pt")
    assert [str(path) for path in RunFolder(run).checkpoints()] == [result]
    fdm("checkpoint", "info", result)


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "metrics.jsonl", "loss.png"])
def test_a_new_run_does_not_overwrite_what_belongs_to_none(tmp_path, name):
    (tmp_path / name).write_text("mine")
    done = fdm(*MICRO, "--run", ".", cwd=tmp_path, check=2)
    assert f"{name} is there already and belongs to no run" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_of_checkpoints_does_not_make_a_project_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.yaml", "checkpoints/best.pt"):
        (tmp_path / name).write_text("mine")
    done = fdm(*MICRO, "--run", tmp_path, check=2)
    assert "config.yaml is there already and belongs to no run" in done.stderr
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_second_run_does_not_wait_for_the_data_of_the_first(tmp_path):
    """While that waits for another process that decodes it."""
    clips, run, cache = tmp_path / "clips.npy", tmp_path / "run", tmp_path / "cache"
    np.save(clips, np.zeros((2, 20, 16, 16, 1), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FDM_CACHE", str(cache))
        lock = ClipCache(data_files.find(clips), 16, 1).folder.with_suffix(".lock")
    cache.mkdir()
    arguments = ("train", "--preset", "micro", "--data", clips, "--run", run)
    with FileLock(lock):
        process = Command(*arguments, FDM_CACHE=str(cache))
        said = StringIO()

        def waits():
            said.write(process.stderr.read())
            return "waiting for another process" in said.getvalue()

        wait_for(waits)
        done = fdm(*arguments, check=2, FDM_CACHE=str(cache))
        assert "another process is training here" in done.stderr
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert not run.exists()  # nothing came of it


def test_two_runs_in_one_folder(tmp_path):
    with RunFolder(tmp_path / "run").locked():
        done = fdm(*MICRO, "--run", tmp_path / "run", check=2)
    assert "another process is training here" in done.stderr


def test_dry_run_starts_nothing(tmp_path):
    done = fdm("train", "--preset", "moving-mnist", "--dry-run", "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["parameters"] == 49_061_377
    assert result["config"]["training"]["batch_size"] == 8
    assert list(tmp_path.iterdir()) == []
    text = fdm("train", "--preset", "micro", "--dry-run", cwd=tmp_path).stdout
    assert yaml.safe_load(text)["model"]["image_size"] == 16


def test_a_pipe_is_no_data_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = fdm("train", "--data", "pipe", cwd=tmp_path, check=2)
    assert "pipe: " in done.stderr


def test_a_configuration_file_and_data_of_one_s_own(tmp_path):
    import numpy as np

    np.save(tmp_path / "my clips.npy", np.random.default_rng(0).integers(0, 256, (3, 12, 20, 24, 3), np.uint8))
    (tmp_path / "mine.yaml").write_text(
        "data: {clip_length: 12}\n"
        "model: {image_size: 16, image_channels: 3, window: 6, patch_size: 2, model_channels: 32,\n"
        "  num_res_blocks: 1, channel_mult: [1], attention_resolutions: [], num_heads: 2}\n"
        "training: {steps: 2, batch_size: 2}\n"
    )
    done = fdm("train", "--config", "mine.yaml", "--data", "my clips.npy", cwd=tmp_path)
    assert done.stdout.strip() == "runs/mine/checkpoints/step-00000002.pt"
    assert (tmp_path / done.stdout.strip()).exists()
    assert "steps 0 to 2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (("--set", "training.stpes=3"), "unknown key 'stpes'", "did you mean 'steps'?"),
        (("--preset", "mikro"), "unknown preset 'mikro'", "did you mean 'micro'?"),
        (("--config", "missing.yaml"), "no such file", None),
        (("--data", "missing.npy"), "no such file: missing.npy", None),
        (("--steps", "0"), "--steps", "fdm train --help"),
        (("--steps", "ten"), "--steps", "fdm train --help"),
        (("--stpes", "10"), "--stpes", "fdm train --help"),
        (("--resume",), "--resume needs --run", None),
        (("--resume", "--run", "nowhere"), "no run to resume", None),
        (("--run", ""), "the name is empty", "--run . is"),
        (("--preset", "micro", "--config", "x.yaml"), "both given", None),
        (("--device", "cuda", "--preset", "micro"), "no cuda device", "--device cpu"),
        (("--device", "gpu"), "--device", None),
        (("--batch-size", "99999999999999999999"), "--batch-size", None),
        (("--preset", "micro", "--set", 'data.source="a\\0b"'), "is no name that a file can have", None),
        (
            (*MICRO[1:], "--set", "model.patch_attention=observed", "--set", "training.weights=patch_attention"),
            "the other weights would stay as random as they are",
            "--init-from",
        ),
    ],
)
def test_bad_usage_is_one_line_and_a_hint_and_nothing_is_written(tmp_path, arguments, says, hint):
    if "cuda" in arguments and torch.cuda.is_available():
        arguments = ("--device", "mps", "--preset", "micro")
        says = "no mps device"
    done = fdm("train", *arguments, cwd=tmp_path, check=2)
    error, *rest = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert says in error
    assert len(rest) <= 1
    if hint:
        assert hint in rest[0]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_is_seen_while_it_trains(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fdm_cli import video

    run = tmp_path / "run"
    often = ("--set", "training.held_out_every=2", "--set", "training.preview_every=4")
    done = fdm(*MICRO[:3], "--steps", 4, *often, "--tensorboard", "--run", run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [("held_out_loss" in record) for record in records] == [False, True, False, True]
    for record in records[1::2]:
        assert record["held_out_loss"] == pytest.approx(sum(record["held_out_quartiles"]) / 4)
        assert f"step {record['step']}: held-out loss {record['held_out_loss']:.4f}" in done.stderr
    assert all(record["learning_rate"] == 2e-3 for record in records)
    assert video.read(run / "samples" / "step-00000004.gif").info.frames == 20
    with Image.open(run / "samples" / "step-00000004.gif") as gif:
        assert gif.size == (2 * 16 + 1, 2 * 16 + 1)
    with Image.open(run / "samples" / "step-00000004.png") as sheet:
        assert sheet.size[0] > 16 * 64
    with Image.open(run / "loss.png") as curves:
        assert curves.size == (900, 520)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert events.Scalars("held_out_loss")[1].value == pytest.approx(records[3]["held_out_loss"])
    assert events.Scalars("held_out_quartiles/4")[0].value == pytest.approx(records[1]["held_out_quartiles"][3])


def test_tensorboard_that_is_not_there(tmp_path):
    (tmp_path / "tensorboard.py").write_text("raise ImportError('not installed')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = fdm(*MICRO, "--tensorboard", "--run", "run", cwd=tmp_path, check=2, anew=True, PYTHONPATH=path)
    assert done.stderr.splitlines()[-2:] == [
        "error: --tensorboard needs tensorboard",
        "hint: pip install tensorboard",
    ]
