import codecs
import copy
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch

from fdm_cli import checkpoint
from fdm_cli.checkpoint import load_checkpoint, read_state, save_state, save_weights
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.run_folder import RunFolder
from tests.conftest import ROOT
from tests.reference import DATA


def test_what_is_loaded_is_the_average_in_eval_mode(micro_checkpoint):
    loaded = load_checkpoint(micro_checkpoint)
    assert loaded.step == 8
    assert not loaded.model.training
    state = read_state(micro_checkpoint)
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, state["ema"][key])
    assert any(not torch.equal(state["ema"][key], state["model"][key]) for key in state["ema"])


def broken(path, tmp_path, how):
    copy = tmp_path / "broken.pt"
    data = path.read_bytes()
    if how == "truncated":
        copy.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        copy.write_bytes(b"")
    elif how == "text":
        copy.write_text("this is not a checkpoint\n" * 100)
    elif how == "flipped byte":
        middle = len(data) // 2
        copy.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "compressed":
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    elif how == "missing":
        pass
    elif how == "folder":
        copy.mkdir()
    return copy


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "flipped byte", "compressed", "missing", "folder"])
def test_broken_files_are_refused(micro_checkpoint, tmp_path, how):
    with pytest.raises(BadInput):
        load_checkpoint(broken(micro_checkpoint, tmp_path, how))


class Touch:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_code_in_a_pickle_does_not_run(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"format": "fdm", "version": 1, "config": Touch(marker)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Touch(marker)))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(BadInput):
            load_checkpoint(tmp_path / name)
    assert not marker.exists()


def edited(path, tmp_path, edit):
    """A copy whose content was changed by somebody who also made the digest match."""
    state = read_state(path)
    edit(state)
    target = tmp_path / "edited.pt"
    save_state(target, {key: value for key, value in state.items() if key not in ("format", "version")})
    return target


@pytest.mark.slow
def test_weights_of_another_architecture_are_named(micro_checkpoint, tmp_path):
    path = edited(micro_checkpoint, tmp_path, lambda state: state["config"]["model"].update(model_channels=64))
    with pytest.raises(BadInput, match=r"time_embed.0.weight is \(128, 32\) float32, expected \(256, 64\)"):
        load_checkpoint(path)
    path = edited(micro_checkpoint, tmp_path, lambda state: state["ema"].pop("out.2.bias"))
    with pytest.raises(BadInput, match=r"out\.2\.bias is missing"):
        load_checkpoint(path)


@pytest.mark.slow
def test_a_configuration_that_claims_an_enormous_network_takes_no_memory(micro_checkpoint, tmp_path):
    def edit(state):
        state["config"]["model"].update(model_channels=4096, num_res_blocks=16, channel_mult=[64, 64])

    with pytest.raises(BadInput, match="do not fit"):
        load_checkpoint(edited(micro_checkpoint, tmp_path, edit))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(1).expand(10**12), "claims"),
        (torch.ones(1, device="meta"), "calls .*meta_tensor"),
        (torch.ones(1).to_sparse(), "calls .*sparse_tensor"),
    ],
)
def test_a_tensor_that_claims_more_than_the_file_holds(micro_checkpoint, tmp_path, tensor, says):
    content = read_state(micro_checkpoint)
    content["ema"]["out.2.bias"] = tensor
    torch.save({**content, "digest": "x"}, tmp_path / "hostile.pt")
    with pytest.raises(BadInput, match=says):
        load_checkpoint(tmp_path / "hostile.pt")


class Call:
    """Unpickling this would call a function."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def doubled(thing, times, build):
    """2 ** times of a thing in as many steps: each level holds the one before twice."""
    for _ in range(times):
        thing = build(thing, thing)
    return thing


def hexed(times):
    """Bytes that double at each of several calls."""
    made = b"0" * 1000
    for _ in range(times):
        made = Call(codecs.encode, made, "hex")
    return made


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: Call(bytearray, 60 * 2**30), "calls __builtin__.bytearray, which no checkpoint needs"),
        (lambda: Call(torch.Tensor, 10**10), "calls torch.Tensor, which"),
        (lambda: hexed(40), "calls _codecs.encode, which"),
        (lambda: doubled([], 60, lambda *both: list(both)), "holds more values than"),
        (lambda: doubled((), 400, lambda one, _: [one]), "holds more values than a checkpoint does, or deeper"),
        (lambda: {number: number for number in range(10**6)}, "its structure alone takes"),
        (lambda: ["x" * 10**6] * 10**5, "claims more content"),
        (lambda: Call(torch.UntypedStorage, 10**10), "calls torch.storage.UntypedStorage, which"),
        (lambda: b"bytes", "calls _codecs.encode, which"),
        (lambda: 2**70, "larger than any"),
    ],
)
def test_bombs_in_a_pickle(tmp_path, content, says):
    path = tmp_path / "bomb.pt"
    torch.save({"format": "fdm", "version": 1, "config": content()}, path)
    began = time.process_time()
    with pytest.raises(BadInput, match=says):
        load_checkpoint(path)
    assert time.process_time() - began < 10


PAIR_OF_ITSELF = b"q\x00h\x00\x86"  # remember the value, take it again, make a tuple of both
MANY_OF_ITSELF = b"q\x00(" + 200 * b"h\x00" + b"t\x86"
ORDERED = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (b"})" + 60 * PAIR_OF_ITSELF + b"Ns", "builds what no checkpoint needs"),  # as keys, whose hash never ends
        (b"})" + 8 * MANY_OF_ITSELF + b"Ns", "builds what no checkpoint needs"),
        (ORDERED + b"(K\x01K\x02tR", "builds what no checkpoint needs"),  # copies of what it is given
        (ORDERED + b"]R", "builds what no checkpoint needs"),
        (20 * (ORDERED + b")R}b"), "builds what no checkpoint needs"),
        (ORDERED + b")R}X\x05\x00\x00\x00itemsK\x01sb", "a dict with attributes"),
        (b"h\x05", "its pickle is broken"),
        (b"0", "its pickle is broken"),
    ],
)
@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL"])
def test_pickles_that_nobody_wrote_by_saving(tmp_path, pickled, says, name):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
        archive.writestr(f"archive/{name}", b"\x80\x02" + pickled + b".")
        archive.writestr("archive/version", "3\n")
    with pytest.raises(BadInput, match=says):
        load_checkpoint(tmp_path / "bomb.pt")


def test_weights_that_share_one_storage_claim_no_more_than_the_file_holds(tmp_path):
    content = torch.load(DATA / "seed-micro.pt", weights_only=True)
    storage = torch.zeros(max(value.numel() for value in content["model_state_dict"].values()), dtype=torch.float16)
    for key, value in content["model_state_dict"].items():
        if key.startswith("_score_network."):
            content["model_state_dict"][key] = storage[: value.numel()].view(value.shape)
    torch.save(content, tmp_path / "shared.pt")
    with pytest.raises(BadInput, match="claims more content than the file holds"):
        load_checkpoint(tmp_path / "shared.pt")


@pytest.mark.parametrize(
    "how",
    ["one entry many times", "another archive before it", "a comment", "two directories", "two sizes", "a folder"],
)
def test_archives_that_are_not_what_they_seem(tmp_path, how):
    source, path = DATA / "seed-micro.pt", tmp_path / "other.pt"
    data = source.read_bytes()
    if how == "another archive before it":
        path.write_bytes(data * 2)
    elif how == "a comment":
        path.write_bytes(data[:-2] + b"\4\0what")
    elif how == "two directories":
        # PyTorch goes where the locator points, Python looks just before it.
        assert struct.unpack("<Q", data[-34:-26]) == (len(data) - 98,)
        path.write_bytes(data[:-34] + struct.pack("<Q", 64) + data[-26:])
    elif how in ("two sizes", "a folder"):
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
            new.writestr("archive/byteorder", "")
            odd = new.filelist[-1]
            if how == "a folder":
                odd.external_attr |= 0x10
            else:  # Python's last word is 0, PyTorch's first and only one 4 GB
                odd.extra = 2 * struct.pack("<2HQ", 1, 8, 0xFFFFFFFF)
    else:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
            largest = max(new.infolist(), key=lambda entry: entry.file_size)
            new.filelist += [copy.copy(largest)] * 10
    with pytest.raises(BadInput, match="overlap, or something precedes"):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", ["a device", "a pipe"])
@pytest.mark.slow
def test_what_has_no_end_is_not_read(tmp_path, kind):
    path = Path("/dev/zero")
    if kind == "a pipe":
        path = tmp_path / "pipe.pt"
        os.mkfifo(path)
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2); "
    script += "from fdm_cli.checkpoint import load_checkpoint; load_checkpoint(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.endswith(f"BadInput: {path}: not a regular file\n")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda content: content.update(version=torch.tensor([1, 2])), "cannot|Boolean value"),
        (lambda content: content.update(model=3), "model is no set of named tensors"),
        (lambda content: content["ema"].update({0: torch.zeros(1)}), "ema is no set of named tensors"),
        (lambda content: content.update(step="many"), "no step"),
        (lambda content: content.update(step=-5), "step is -5"),
        (lambda content: content.update(ema_updates=-1), "ema_updates is -1"),
        (lambda content: content.update(config=[]), "no config"),
        (lambda content: content["config"].update(deep=doubled([], 200, lambda one, _: [one])), "deeper nested"),
    ],
)
@pytest.mark.slow
def test_content_of_other_types_is_refused(micro_checkpoint, tmp_path, edit, says):
    content = read_state(micro_checkpoint)
    edit(content)
    content["digest"] = checkpoint._digest(content)  # as somebody would write it who knows the format
    torch.save(content, tmp_path / "odd.pt")
    for read in (load_checkpoint, read_state):
        with pytest.raises(BadInput, match=says):
            read(tmp_path / "odd.pt")


def test_a_seed_file_with_a_key_that_is_no_name(tmp_path):
    content = torch.load(DATA / "seed-micro.pt", weights_only=True)
    content["model_state_dict"][0] = torch.zeros(1)
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(BadInput, match="not a set of named tensors"):
        load_checkpoint(tmp_path / "odd.pt")


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file_and_nothing_else(micro_checkpoint, tmp_path):
    target = tmp_path / "step.pt"
    shutil.copy(micro_checkpoint, target)
    before = target.read_bytes()
    code = f"""
import resource, signal
from pathlib import Path
from fdm_cli.checkpoint import read_state, save_state
from fdm_cli.errors import RunFailed
state = read_state(Path({str(micro_checkpoint)!r}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_state(Path({str(target)!r}), {{k: v for k, v in state.items() if k not in ("format", "version")}})
except RunFailed as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no space left" in done.stdout
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_an_unwritable_place(tmp_path):
    with pytest.raises(RunFailed, match="cannot write"):
        save_state(tmp_path / "no" / "folder.pt", {"config": {}, "step": 1, "model": {}, "ema": {}, "optimizer": {}})


def mutants(data: bytes, count: int):
    """The file with bytes flipped, cut off, inserted or overwritten, most often where a zip keeps its structure."""
    random = Random(0)
    places = [match.start() for match in re.finditer(rb"PK", data)] + [0, len(data) - 40]
    for number in range(count):
        at = random.choice(places) + random.randrange(60) if random.random() < 0.6 else random.randrange(len(data))
        at = min(at, len(data) - 1)
        kind = number % 4
        if kind == 0:
            yield data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            yield data[:at]
        elif kind == 2:
            yield data[:at] + random.randbytes(random.randrange(1, 9)) + data[at:]
        else:
            yield data[:at] + random.randbytes(8) + data[at + 8 :]


@pytest.mark.parametrize("kind", ["seed", "own", "safetensors"])
@pytest.mark.slow
def test_mutated_files_are_refused_or_harmless(tmp_path, kind):
    """Never another exception, and never other weights; what happens to bytes that mean nothing does not matter."""
    source = DATA / "seed-micro.pt"
    if kind != "seed":
        source = tmp_path / f"own{'.safetensors' if kind == 'safetensors' else '.pt'}"
        save_weights(source, load_checkpoint(DATA / "seed-micro.pt"))
    expected = load_checkpoint(source).model.state_dict()
    path = tmp_path / f"mutant{source.suffix}"
    refused = 0
    for data in mutants(source.read_bytes(), 200):
        path.write_bytes(data)
        try:
            weights = load_checkpoint(path).model.state_dict()
        except BadInput:
            refused += 1
            continue
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert refused > 100


def test_weights_too_large_for_half_precision_are_refused(micro_checkpoint, tmp_path):
    loaded = load_checkpoint(micro_checkpoint)
    with torch.no_grad():
        loaded.model.out[2].weight[0] = 1e6
    with pytest.raises(BadInput, match=r"out.2.weight: 1e\+06 is too large for half precision"):
        save_weights(tmp_path / "half.pt", loaded, half=True)
    assert not (tmp_path / "half.pt").exists()
    save_weights(tmp_path / "whole.pt", loaded)


def test_a_path_that_is_no_text(micro_checkpoint, tmp_path):
    path = tmp_path / "n\udcfe"
    path.mkdir()
    shutil.copy(micro_checkpoint, path / "a.pt")
    with pytest.raises(BadInput, match="need a path that is text"):
        load_checkpoint(path / "a.pt")
    with pytest.raises(BadInput, match="need a path that is text"):
        RunFolder(path / "run").refuse_foreign()
