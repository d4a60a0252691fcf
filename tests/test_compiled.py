import numpy as np
import pytest
import torch

from fdm_cli import config as configuration
from fdm_cli.checkpoint import read_state
from fdm_cli.compiled import compile_blocks
from fdm_cli.unet import UNet
from tests.conftest import fdm
from tests.networks import SMALLEST, SMALLEST_OPTIONS, randomise

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the compiler, about itself


@pytest.fixture(autouse=True, scope="module")
def _kernels_of_its_own(tmp_path_factory):
    """What is compiled is kept for the next test, not for the next time; one process does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield


def network():
    """One whose blocks are not the identity that they start as."""
    torch.manual_seed(0)
    model = UNet(configuration.load_preset("micro", SMALLEST)).train()
    randomise(model, std=0.05)
    return model


def call(latent_frames, clips=2):
    latent = (torch.arange(4) < latent_frames).expand(clips, -1)
    x_0, x_t = torch.randn(2, clips, 4, 1, 8, 8, generator=torch.Generator().manual_seed(latent_frames))
    indices = torch.arange(4).expand(clips, -1)
    return {
        "x_t": x_t, "timestep": torch.arange(clips) * 100, "x_0": x_0, "frame_indices": indices,
        "observed_mask": ~latent, "latent_mask": latent,
    }  # fmt: skip


def test_outputs_and_gradients_are_the_eager_ones_whatever_the_number_of_latent_frames():
    from torch._dynamo.utils import counters

    eager, compiled = network(), network()
    compile_blocks(compiled)
    graphs = set()
    for latent_frames in (2, 1, 3, 4):
        made = []
        for model in (eager, compiled):
            model.zero_grad()
            output = model(**call(latent_frames))
            output.square().mean().backward()
            made.append((output.detach(), {name: p.grad for name, p in model.named_parameters()}))
        (expected, gradients), (output, others) = made
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=0, atol=1e-4, msg=name)
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1
    assert graphs.pop() > 0


def test_training_and_sampling(tmp_path):
    # Two clips, as above: what was compiled there is found again.
    common = ("train", "--preset", "micro", *SMALLEST_OPTIONS, "--batch-size", 2, "--steps", 3, "--quiet")
    fdm(*common, "--run", "eager", cwd=tmp_path)
    fdm(*common, "--set", "training.compile=true", "--run", "compiled", cwd=tmp_path)
    mine, other = (read_state(tmp_path / run / "checkpoints" / "step-00000003.pt") for run in ("compiled", "eager"))
    for name, value in other["model"].items():
        torch.testing.assert_close(mine["model"][name], value, rtol=0, atol=1e-4, msg=name)
    sample = ("sample", "--checkpoint", "eager/checkpoints/step-00000003.pt", "--length", 8, "--seed", 1)
    for options in ((), ("--compile",)):
        fdm(*sample, "--sampling-steps", 3, "-o", f"{len(options)}.npz", *options, cwd=tmp_path)
    with np.load(tmp_path / "0.npz") as expected, np.load(tmp_path / "1.npz") as made:
        assert np.abs(made["frames"].astype(int) - expected["frames"]).max() <= 1


@pytest.mark.parametrize("command", ["train", "sample"])
def test_without_a_compiler_it_is_one_line(micro_weights, tmp_path, command):
    arguments = {
        "train": ("--preset", "micro", "--steps", 1, "--set", "training.compile=true"),
        "sample": ("--checkpoint", micro_weights, "--length", 4, "--scheme", "single", "--compile"),
    }[command]
    no_compiler = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    done = fdm(command, *arguments, cwd=tmp_path, check=1, anew=True, **no_compiler)
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: torch.compile failed: ")
    assert "Traceback" not in done.stderr
    assert hint.startswith("hint: ")
    assert "compile" in hint
