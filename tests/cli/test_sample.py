import json
import time

import av
import numpy as np
import pytest
from PIL import Image

from tests.command import Command
from tests.conftest import ROOT, fdm

pytestmark = pytest.mark.slow

FAST = ("--sampling-steps", 2, "--seed", 5)


def frames_of(path):
    with np.load(path) as arrays:
        return arrays["frames"]


def test_160_frames_to_a_gif(micro_weights, tmp_path):
    done = fdm(
        "sample", "--checkpoint", micro_weights, "--scheme", "autoregressive", "--length", 160, *FAST,
        "-o", tmp_path / "out.gif", "--sheet", "--json", anew=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["frames"] == 160
    assert (result["width"], result["height"], result["fps"]) == (16, 16, 10.0)
    assert result["network_calls"] == 38
    assert "memory: a network call on 1 window needs" in done.stderr
    assert "fits a T4" in done.stderr
    assert result["sampler"] == "dpm-solver++"
    assert len(result["checkpoint_sha256"]) == 64
    with Image.open(tmp_path / "out.gif") as gif:
        durations = []
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
    assert sum(durations) == 160 * 100
    report = json.loads((tmp_path / "out.gif.json").read_text())
    stages = report.pop("stages")
    assert report.items() <= result.items()
    assert sum(len(stage["latent"]) for stage in stages) == 160
    with Image.open(tmp_path / "out.gif.sheet.png") as sheet:
        assert sheet.width > 100
    assert len(list(tmp_path.iterdir())) == 3


def test_a_video_from_nothing_begins_with_few_frames(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 40, *FAST, "--begin", 3)
    planned = json.loads(fdm(*common, "--dry-run", "--json", cwd=tmp_path).stdout)
    assert (planned["begin"], planned["calls"], planned["network_calls"]) == (3, 7, 14)
    assert "window 16, step 8, begin 3)" in fdm(*common, "--dry-run", cwd=tmp_path).stdout
    result = json.loads(fdm(*common, "-o", "few.npz", "--json", cwd=tmp_path).stdout)
    assert (result["begin"], result["network_calls"]) == (3, 14)
    stages = json.loads((tmp_path / "few.npz.json").read_text())["stages"]
    assert [len(stage["latent"]) for stage in stages] == [3, 3, 6, 4, 8, 8, 8]
    assert [len(stage["observed"]) for stage in stages] == [0, 3, 6, 12, 8, 8, 8]
    fdm(*common[:-2], "-o", "whole.npz", cwd=tmp_path)
    few, whole = (frames_of(tmp_path / name) for name in ("few.npz", "whole.npz"))
    assert few.shape == whole.shape
    assert not np.array_equal(few[3:], whole[3:])
    assert "'--begin': Input should be greater than or equal to 1" in fdm(*common[:-1], 0, cwd=tmp_path, check=2).stderr


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_npz_and_mp4_hold_the_same_frames(micro_weights, tmp_path, sampler):
    common = ("sample", "--checkpoint", micro_weights, "--length", 21, "--sampler", sampler, *FAST, "-q")
    fdm(*common, "-o", tmp_path / "a.npz", "--fps", 25)
    fdm(*common, "-o", tmp_path / "a.mp4")
    frames = frames_of(tmp_path / "a.npz")
    assert frames.shape == (21, 16, 16, 1)
    assert frames.dtype == np.uint8
    assert frames.std() > 5
    with np.load(tmp_path / "a.npz") as arrays:
        assert float(arrays["fps"]) == 25
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
    assert decoded.shape == (21, 16, 16)
    assert np.abs(decoded.astype(int) - frames[..., 0]).mean() < 6


def test_samples_are_numbered_and_each_has_its_own_random_numbers(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 20, *FAST, "--json")
    many = json.loads(fdm(*common, "--num-samples", 3, "-o", tmp_path / "x.npz").stdout)
    assert many["outputs"] == [str(tmp_path / f"x-{i}.npz") for i in (1, 2, 3)]
    one = json.loads(fdm(*common, "-o", tmp_path / "one.npz", "--max-batch", 1).stdout)
    first, second, _ = (frames_of(path).astype(int) for path in many["outputs"])
    assert np.abs(first - second).mean() > 1
    # The first sample does not depend on how many others share its batches, beyond rounding.
    assert np.abs(first - frames_of(one["output"])).max() <= 1


def test_a_name_is_chosen_and_printed(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 4, "--scheme", "single", *FAST)
    names = [fdm(*common, cwd=tmp_path).stdout.strip() for _ in range(2)]
    assert names == ["sample-single-1.gif", "sample-single-2.gif"]
    done = fdm(*common[:-2], cwd=tmp_path)
    assert "seed" in done.stderr
    for left in ("sample-single-1-2.gif.sheet.png", "sample-single-2-1.gif.json"):
        (tmp_path / left).touch()
    paths = json.loads(fdm(*common, "--num-samples", 2, "--json", cwd=tmp_path).stdout)["outputs"]
    assert paths == ["sample-single-3-1.gif", "sample-single-3-2.gif"]


def test_what_appears_meanwhile_is_not_overwritten(micro_weights, tmp_path):
    command = ("sample", "--checkpoint", micro_weights, "--length", 60, "--seed", 1, *FAST, "-o", "a.npz")
    process = Command(*command, cwd=tmp_path)
    while process.poll() is None and not (tmp_path / ".a.npz.work").exists():
        time.sleep(0.001)
    (tmp_path / "a.npz.json").write_bytes(b"precious")
    process.wait(timeout=120)
    assert process.returncode == 2
    process.stderr.seek(0)
    assert "error: a.npz.json: exists already" in process.stderr.read()
    assert (tmp_path / "a.npz.json").read_bytes() == b"precious"
    assert not (tmp_path / "a.npz").exists()
    fdm(*command, "--resume", cwd=tmp_path, check=2)
    (tmp_path / "a.npz.json").unlink()
    fdm(*command, "--resume", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.json"]


def test_a_run_stands_for_its_newest_checkpoint(micro_run, micro_checkpoint, tmp_path):
    common = ("sample", "--checkpoint", micro_run, "--length", 2, *FAST, "--json")
    made = json.loads(fdm(*common, "-o", tmp_path / "x.npz").stdout)
    assert made["checkpoint"] == str(micro_checkpoint)
    done = fdm("sample", "--checkpoint", tmp_path, check=2)
    assert "is a folder, not a checkpoint file" in done.stderr


def test_windows_that_see_nothing_are_warned_about(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 48, "--dry-run")
    assert "observe no frame" not in fdm(*common, cwd=tmp_path).stderr
    said = fdm(*common, "--step", 16, cwd=tmp_path).stderr
    assert "warning: 3 of 3 windows observe no frame: the video jumps; a smaller --step, or" in said
    said = fdm(*common, "--window", 1, cwd=tmp_path).stderr
    assert "warning: 48 of 48 windows observe no frame: the video jumps; a model with a larger window, or" in said


def test_another_spacing_of_the_steps_is_another_video(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 16, "--sampling-steps", 4, "--seed", 1, "--json")
    frames = []
    for number, shift in enumerate(((), ("--timestep-shift", 1), ("--timestep-shift", 2))):
        done = fdm(*common, *shift, "-o", f"{number}.npz", cwd=tmp_path)
        assert json.loads(done.stdout)["timestep_shift"] == (shift[1] if shift else 1)
        frames.append(np.load(tmp_path / f"{number}.npz")["frames"])
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])


def test_rescaled_guidance_is_another_video(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 20, "--sampling-steps", 3, "--seed", 1, "--json")
    frames = []
    for number, rescale in enumerate(((), ("--guidance-rescale", 0), ("--guidance-rescale", 1))):
        done = fdm(*common, "--guidance", 3, *rescale, "-o", f"{number}.npz", cwd=tmp_path)
        assert json.loads(done.stdout)["guidance_rescale"] == (rescale[1] if rescale else 0)
        frames.append(np.load(tmp_path / f"{number}.npz")["frames"])
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])


def test_dry_run_writes_nothing(micro_weights, tmp_path):
    common = ("sample", "--checkpoint", micro_weights, "--length", 160, "--dry-run", "--json")
    result = json.loads(fdm(*common, cwd=tmp_path).stdout)
    assert (result["calls"], result["waves"], result["network_calls"]) == (19, 19, 19 * 15)
    assert result["estimated_seconds"] > 0
    guided = json.loads(fdm(*common, "--guidance", 2, cwd=tmp_path).stdout)
    assert guided["network_calls"] == (1 + 18 * 2) * 15  # the first window observes nothing
    assert list(tmp_path.iterdir()) == []


def test_a_scheme_that_reaches_further_than_the_training_clips_is_warned_about(micro_weights, tmp_path):
    done = fdm(
        "sample", "--checkpoint", micro_weights, "--scheme", "hierarchy-2", "--length", 60, "--dry-run", cwd=tmp_path
    )
    assert "warning: the scheme reaches" in done.stderr
    assert "clips of 20" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--length", "0"), "--length"),
        (("--length", "100000000000000000000"), "--length"),
        (("--scheme", "autoregresive"), "autoregresive"),
        (("--scheme", "missing.yaml"), "missing.yaml"),
        (("--sampler", "dimm"), "unknown sampler 'dimm'"),
        (("--sampling-steps", "2000"), "2000 sampling steps"),
        (("--eta", "0.5", "--sampler", "ancestral"), "--eta 0.5 is for ddim, ancestral has none"),
        (("--guidance", "nan"), "Input should be"),
        (("--guidance", "2", "--guidance-rescale", "1.5"), "rescale': Input should be less than or equal to 1"),
        (("--guidance-rescale", "0.5"), "--guidance-rescale 0.5 needs guidance, and there is none"),
        (("--fps", "nan"), "Input should be"),
        (("--step", "17"), "the step must be"),
        (("-o", "no/such/folder.gif"), "no/such"),
        (("-o", "out.gfi"), "out.gfi"),
        (("-o", "run.gif/"), "run.gif/: a folder of PNG images has a name without a dot"),
        (("-o", "./"), "'./' is no name of a video"),
        (("-o", "-"), "a video is not written to stdout"),
        (("-o", ""), "'' is no name of a video"),
        (("-o", ".gif"), "'.gif' is no name of a video"),
        (("--length", "200000", "-o", "long.gif", "--dry-run"), "at most 150000"),
        (("-o", "exists.gif"), "exists"),
        (("-o", "fresh.gif"), "fresh.gif.json: exists already"),
        (("-o", "folder.gif", "--force"), "folder.gif.json: is a folder"),
        (("--num-samples", "0"), "--num-samples"),
        (("--scheme", "adaptive-hierarchy-2", "--embedding", "pixel"), "unknown embedding 'pixel'"),
        (("--scheme", "prepend"), "prepend needs given frames"),
    ],
)
def test_bad_usage(micro_weights, tmp_path, arguments, says):
    (tmp_path / "exists.gif").write_bytes(b"precious")
    (tmp_path / "fresh.gif.json").write_bytes(b"precious")
    (tmp_path / "folder.gif.json").mkdir()
    done = fdm("sample", "--checkpoint", micro_weights, *arguments, cwd=tmp_path, check=2)
    error, *rest = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert says in error
    assert [line[:6] for line in rest] in ([], ["hint: "])
    assert done.stdout == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == {
        "exists.gif": b"precious", "fresh.gif.json": b"precious",
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip at all"])
def test_a_checkpoint_that_is_none(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    done = fdm("sample", "--checkpoint", "x.pt", cwd=tmp_path, check=2)
    assert done.stderr.startswith("error: x.pt: not a checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_force_overwrites(micro_weights, tmp_path):
    (tmp_path / "out.gif").write_bytes(b"old")
    fdm("sample", "--checkpoint", micro_weights, "--length", 3, *FAST, "-o", "out.gif", "--force", cwd=tmp_path)
    assert (tmp_path / "out.gif").read_bytes().startswith(b"GIF89a")


def test_a_chosen_name_is_one_of_a_file_here(micro_weights, tmp_path):
    scheme = (ROOT / "schemes" / "autoregressive.yaml").read_text().replace("name: autoregressive", "name: a/b")
    (tmp_path / "mine.yaml").write_text(scheme)
    common = ("--checkpoint", micro_weights, "--length", 3, *FAST)
    assert fdm("sample", *common, "--scheme", "mine.yaml", cwd=tmp_path).stdout.strip() == "sample-a-b-1.gif"
    frames = tmp_path / "frames"
    fdm("sample", *common, "-o", frames, cwd=tmp_path)
    assert fdm("extend", ".", *common[:2], *FAST, "--length", 4, cwd=frames).stdout.strip() == "frames-extended-1.gif"
    (frames / "inner").mkdir()
    done = fdm("extend", "..", *common[:2], *FAST, "--length", 4, cwd=frames / "inner")
    assert done.stdout.strip() == "frames-extended-1.gif"


def test_what_stands_where_unfinished_frames_would_lie(micro_weights, tmp_path):
    (tmp_path / ".a.gif.work").write_text("mine")
    for force in ((), ("--force",)):
        done = fdm("sample", "--checkpoint", micro_weights, "-o", "a.gif", *force, cwd=tmp_path, check=2)
        assert "error: .a.gif.work is in the way" in done.stderr
    assert (tmp_path / ".a.gif.work").read_text() == "mine"


def test_runs_that_begin_at_once_choose_different_names(micro_weights, tmp_path):
    command = ("sample", "--checkpoint", micro_weights, "--scheme", "single", "--length", 8, "--sampling-steps", 2)
    runs = [Command(*command, cwd=tmp_path) for _ in range(4)]
    for run in runs:
        _, stderr = run.communicate(timeout=120)
        assert run.returncode == 0, stderr
    names = {f"sample-single-{number}.gif{end}" for number in range(1, 5) for end in ("", ".json")}
    assert {path.name for path in tmp_path.iterdir()} == names
