import json
from pathlib import Path

import numpy as np
import pytest

from fdm_cli.checkpoint import load_checkpoint, read_state
from tests.conftest import fdm
from tests.networks import SMALLEST_OPTIONS
from tests.reference import DATA

pytestmark = pytest.mark.slow

SEED = DATA / "seed-micro.pt"


def test_info(micro_checkpoint):
    seed = json.loads(fdm("checkpoint", "info", SEED, "--json").stdout)
    assert (seed["format"], seed["step"], seed["resumable"]) == ("seed", 1234, False)
    assert seed["config"]["model"]["model_channels"] == 32
    own = fdm("checkpoint", "info", micro_checkpoint, anew=True).stdout
    assert "fdm checkpoint after 8 steps" in own
    assert "training can be resumed from it" in own


@pytest.mark.parametrize("name", ["own.pt", "own.safetensors"])
def test_a_seed_checkpoint_converts_and_samples_the_same(tmp_path, name):
    made = []
    fdm("checkpoint", "convert", SEED, name, cwd=tmp_path)
    for checkpoint in (SEED, name):
        out = tmp_path / f"{len(made)}.npz"
        fdm("sample", "--checkpoint", checkpoint, "--length", 10, "--sampling-steps", 4, "--seed", 1, "-o", out,
            cwd=tmp_path)  # fmt: skip
        with np.load(out) as arrays:
            made.append(arrays["frames"])
    assert made[0].shape == (10, 8, 8, 1)
    assert np.array_equal(*made)


def test_extend_and_guidance_with_a_seed_checkpoint(tmp_path):
    out = tmp_path / "out.npz"
    clip = DATA / "one-digit.gif"
    done = fdm("extend", clip, "--use", check=2)
    assert "No such option" in done.stderr
    guided = ("--guidance", 1.5, "--guidance-rescale", 0.7)
    fdm("extend", clip, "--checkpoint", SEED, "--length", 20, "--sampling-steps", 3, *guided, "-o", out)
    with np.load(out) as arrays:
        assert arrays["frames"].shape == (20, 8, 8, 1)


def test_training_starts_from_a_checkpoint(tmp_path):
    fdm(
        "train", "--init-from", SEED, "--steps", 1, "--run", "run", "--set", "training.learning_rate=1e-9", cwd=tmp_path
    )
    started = read_state(tmp_path / "run" / "checkpoints" / "step-00000000.pt")
    weights = load_checkpoint(SEED).model.state_dict()
    for key, value in weights.items():
        assert np.array_equal(started["model"][key].numpy(), value.numpy())
    state = read_state(tmp_path / "run" / "checkpoints" / "step-00000001.pt")
    assert state["config"]["model"]["image_size"] == 8
    done = fdm("train", "--init-from", SEED, "--preset", "micro", "--run", "other", cwd=tmp_path, check=2)
    assert "the weights do not fit the model to train: " in done.stderr
    assert "input_blocks.0.0.weight is (32, 2, 3, 3) float32, expected (32, 5, 3, 3) float32" in done.stderr
    done = fdm("train", "--init-from", SEED, "--resume", "--run", "run", cwd=tmp_path, check=2)
    assert "both given" in done.stderr


def test_patch_attention_is_added_to_a_trained_network(tmp_path):
    """And is all that is trained, after --resume too; what has it does not become a network that has not."""
    added = ("--set", "model.patch_attention=observed", "--set", "training.weights=patch_attention")
    done = fdm("train", "--init-from", SEED, *added, "--steps", 1, "--run", "run", cwd=tmp_path)
    assert "model.patch_attention is new" in done.stderr
    fdm("train", "--resume", "--steps", 3, "--run", "run", cwd=tmp_path)
    begun, ended = (read_state(tmp_path / "run" / "checkpoints" / f"step-0000000{step}.pt") for step in (0, 3))
    trained = {key for key in ended["model"] if not np.array_equal(begun["model"][key], ended["model"][key])}
    assert trained
    assert all(key.startswith("patch_attention.") for key in trained)
    for key, value in load_checkpoint(SEED).model.state_dict().items():
        assert np.array_equal(ended["ema"][key].numpy(), value.numpy())
    fdm("sample", "--checkpoint", "run", "--length", 10, "--sampling-steps", 2, "-o", "out.npz", cwd=tmp_path)
    done = fdm("train", "--init-from", "run", "--set", "model.patch_attention=none", "--set", "training.weights=all",
               "--dry-run", cwd=tmp_path, check=2)  # fmt: skip
    assert "patch_attention.compare.0.weight is not part of it" in done.stderr
    done = fdm("train", "--init-from", SEED, *added[2:], "--dry-run", cwd=tmp_path, check=2)
    assert "training.weights patch_attention: the network has none" in done.stderr


@pytest.mark.slow
def test_a_draft_is_trained_first_and_the_network_with_it_then(tmp_path):
    """At first alone, after --resume too."""
    draft = ("--set", "model.draft=motion", "--set", "training.weights=draft", "--threads", 1)
    fdm("train", "--preset", "micro", *SMALLEST_OPTIONS, "--steps", 1, "--run", "network", cwd=tmp_path)
    done = fdm("train", "--init-from", "network", *draft, "--steps", 1, "--run", "draft", cwd=tmp_path)
    assert "model.draft is new to these weights" in done.stderr
    fdm("train", "--resume", "--steps", 3, "--run", "draft", cwd=tmp_path)
    first = differing(tmp_path / "draft", 0, 3)
    assert first
    assert all(key.startswith("draft.") for key in first)
    settings = tmp_path / "draft" / "config.yaml"
    settings.write_text(settings.read_text().replace("weights: draft", "weights: all"))
    done = fdm("train", "--resume", "--steps", 4, "--run", "draft", cwd=tmp_path, check=2)
    assert "the run trained draft" in done.stderr
    assert "--set training.weights=all" in done.stderr
    then = ("--set", "training.weights=all", "--steps", 2)
    done = fdm("train", "--init-from", "draft", *then, "--run", "both", cwd=tmp_path)
    assert "is new" not in done.stderr
    second = differing(tmp_path / "both", 0, 2)
    assert {"of_draft.weight", "input_blocks.0.0.weight", "draft.move.weight"} <= second
    fdm("sample", "--checkpoint", "both", "--length", 24, "--sampling-steps", 2, "-o", "out.npz", cwd=tmp_path)
    fdm("checkpoint", "convert", "--half", "both/checkpoints/step-00000002.pt", "half.safetensors", cwd=tmp_path)
    fdm("extend", DATA / "two-digits.gif", "--use-last", 4, "--length", 12, "--checkpoint", "half.safetensors",
        "--sampling-steps", 2, "-o", "out.gif", cwd=tmp_path)  # fmt: skip
    patches = ("--set", "model.patch_attention=observed", "--set", "training.weights=patch_attention")
    done = fdm("train", "--init-from", "network", *draft[:2], *patches, "--dry-run", cwd=tmp_path, check=2)
    assert "training.weights patch_attention: the draft would stay as random as it is" in done.stderr
    assert "--set training.weights=draft" in done.stderr
    fdm("train", "--init-from", "network", *draft[:2], "--steps", 1, "--run", "at-once", cwd=tmp_path)


def differing(run: Path, one: int, other: int) -> set[str]:
    """The weights that differ between two checkpoints of a run."""
    begun, ended = (read_state(run / "checkpoints" / f"step-{step:08}.pt")["model"] for step in (one, other))
    return {key for key in ended if not np.array_equal(begun[key], ended[key])}


def test_windows_go_on_growing_from_where_the_weights_have_got_to(tmp_path):
    growing = ("--set", "data.clip_length=160", "--set", "data.first_clip_length=20", "--set", "data.growth_steps=3")
    fdm("train", "--preset", "micro", *SMALLEST_OPTIONS, *growing, "--steps", 1, "--run", "run", cwd=tmp_path)
    done = fdm("train", "--init-from", "run", "--dry-run", "--json", cwd=tmp_path)
    data = json.loads(done.stdout)["config"]["data"]
    assert (data["first_clip_length"], data["growth_steps"], data["clip_length"]) == (40, 2, 160)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--set", "model.num_heads=4"), "they were trained with model.num_heads 2, not 4"),
        (("--set", "model.attention_residual=plain"), "model.attention_residual normalised, not plain"),
        (("--preset", "micro"), "input_blocks.0.0.weight is (32, 2, 3, 3) float32, expected (32, 5, 3, 3) float32"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_weights_of_another_network_are_refused_before_anything_is_done(tmp_path, options, says, dry):
    done = fdm("train", "--init-from", SEED, *options, *dry, "--run", "run", cwd=tmp_path, check=2)
    assert says in done.stderr
    assert not list(tmp_path.iterdir())
    fdm("train", "--preset", "micro", "--init-from", "missing.pt", *dry, cwd=tmp_path, check=2)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_process_are_taken_with_a_warning(tmp_path):
    done = fdm("train", "--init-from", SEED, "--set", "diffusion.parameterization=v", "--dry-run", cwd=tmp_path)
    assert "warning: the weights were trained with diffusion.parameterization eps, this run has v" in done.stderr


def test_the_seed_s_own_training_yaml_trains(tmp_path):
    done = fdm(
        "train", "--config", DATA / "seed-micro.yaml", "--steps", 1, "--set", "training.batch_size=1", cwd=tmp_path
    )
    checkpoint = load_checkpoint(tmp_path / done.stdout.strip())
    assert checkpoint.config.diffusion.timesteps == 40


def test_a_run_s_own_checkpoint_is_not_converted_onto_itself(micro_checkpoint, tmp_path):
    mine = tmp_path / "mine.pt"
    mine.write_bytes(micro_checkpoint.read_bytes())
    done = fdm("checkpoint", "convert", mine, mine, "--force", check=2)
    assert "is what is converted, and the training could not go on from it" in done.stderr
    assert mine.read_bytes() == micro_checkpoint.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("info", "missing.pt"), "no such file: missing.pt"),
        (("info", "text.pt"), "text.pt: not a checkpoint"),
        (("convert", SEED, "out.bin"), "unknown ending '.bin'"),
        (("convert", SEED, "text.pt"), "text.pt: exists already"),
        (("convert", SEED, "no/out.pt"), "there is no folder no"),
        (("convert", "text.pt", "out.pt"), "text.pt: not a checkpoint"),
    ],
)
def test_bad_usage(tmp_path, arguments, says):
    (tmp_path / "text.pt").write_text("precious")
    done = fdm("checkpoint", *arguments, cwd=tmp_path, check=2)
    assert done.stderr.startswith("error: ")
    assert says in done.stderr.splitlines()[0]
    assert [path.name for path in tmp_path.iterdir()] == ["text.pt"]
    assert (tmp_path / "text.pt").read_text() == "precious"
