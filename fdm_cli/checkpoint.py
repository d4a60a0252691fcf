"""Checkpoint files: self-describing, written whole or not at all, checked when read.

An own file is a zip that `torch.save` made of plain types and tensors only:

    {"format": "fdm", "version": 1, "config": {...}, "step": n, "ema": {...},
     "model": {...}, "ema_updates": n, "optimizer": {...}, "scaler": {...},    what training needs to go on; a
                                                                               converted file has none
     "digest": "sha256 of all of the above"}

or a `.safetensors` file of the EMA weights with the same configuration, step and digest in its metadata. The files
of the earlier implementations are read too (`predecessors`). Nothing in a file is ever executed
(`weights_only=True`, after `pickle_check`); a flipped bit, a compressed bomb and tensors that claim more than the file
holds are refused before anything is computed with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fdm_cli import config as configuration
from fdm_cli import predecessors
from fdm_cli.config import Config
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput, FdmError, RunFailed, is_out_of_memory
from fdm_cli.files import PASSING, refuse_unencodable, replacing
from fdm_cli.pickle_check import MOST_BYTES, refuse_bombs
from fdm_cli.unet import UNet

FORMAT, VERSION = "fdm", 1
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRAINING = {"model": dict, "ema_updates": int, "optimizer": dict}  # what a run goes on with
_MOST_VALUES, _DEEPEST = 1_000_000, 32  # of what is in a file, nested


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint ready to sample from.

    Attributes:
        config: the run's whole configuration.
        step: training steps done.
        process: the diffusion process it was trained on.
        model: the network with its EMA weights (the seed's files hold no others than the last), in eval mode.
        sha256: of the file.
        format: `fdm`, `seed` or `official`: who wrote it.
        resumable: whether training can go on from it.
    """

    config: Config
    step: int
    process: Process
    model: UNet
    sha256: str
    format: str
    resumable: bool

    @property
    def clip_length(self) -> int:
        """Frames that training windows have spanned so far: less than the configuration's while they still grow."""
        return self.config.data.spanned(max(0, self.step - 1))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads a checkpoint for sampling: own, of the seed or of the authors, recognised by its content.

    Raises:
        BadInput: missing, corrupt or hostile file, or weights that do not fit the configuration in it.
    """
    path = Path(path)
    with _refusing(path):
        content = _load(path)
        kind = content_format(content, path)
        if kind == "seed":
            config, weights = predecessors.read_seed(content, str(path))
        elif kind == "official":
            config, weights = predecessors.read_official(content, str(path))
        else:
            _check_own(content, path)
            config, weights = configuration.from_dict(content["config"], str(path)), content["ema"]
        model = build_model(config, weights, path)
    step = content.get("step", 0)
    return Checkpoint(
        config=config,
        step=max(0, step) if isinstance(step, int) else 0,
        process=Process(config.diffusion),
        model=model.to(device).eval(),
        sha256=file_sha256(path),
        format=kind,
        resumable=kind == FORMAT and _holds(content, _TRAINING) is None,
    )


def content_format(content: Any, path: Path) -> str:
    """`fdm`, `seed` or `official`; BadInput for anything else."""
    if isinstance(content, dict):
        if content.get("format") == FORMAT:
            return FORMAT
        if predecessors.is_seed(content):
            return "seed"
        if predecessors.is_official(content):
            return "official"
    raise BadInput(f"{path}: not a checkpoint", "known are those of fdm, of the seed implementation and of the authors")


def build_model(config: Config, weights: Mapping[str, Tensor], path: Path) -> UNet:
    """The configuration's network with these weights.

    Shapes are compared before any memory is taken, so that a file cannot claim a larger network than it holds.

    Raises:
        BadInput: naming the first key that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = UNet(config)
    expected = model.state_dict()
    refuse_mismatch(expected, weights, f"{path}: the weights do not fit its configuration")
    if sum(weights[key].nbytes for key in expected) > path.stat().st_size:
        raise BadInput(f"{path}: its weights share their content: a file holds at most as much as it is long")
    # The file is mapped into memory; the model must outlive it. Half precision is for storage only.
    copies = {key: weights[key].to(torch.float32, copy=True) for key in expected}
    model.load_state_dict(copies, assign=True)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def refuse_mismatch(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    """Raises BadInput for the first key that is missing, of another shape or type, or unknown."""
    for key, value in expected.items():
        if key not in weights:
            raise BadInput(f"{what}: {key} is missing")
        if weights[key].shape != value.shape or weights[key].dtype not in _DTYPES:
            raise BadInput(f"{what}: {key} is {_shape(weights[key])}, expected {_shape(value)}")
    for key in weights:
        if key not in expected:
            raise BadInput(f"{what}: {key} is not part of it")


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes what `Trainer.state` makes to a temporary file, verifies the checksums in it, renames it.

    Raises:
        RunFailed: the file cannot be written (disk full, no permission); an older file of that name is intact.
    """
    content = {"format": FORMAT, "version": VERSION, **state}
    content["digest"] = _digest(content)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(content, file)
        try:
            with _refusing(temporary):
                _check_zip(temporary)
        except BadInput as error:
            raise RunFailed(f"cannot write {path}: what was written is broken; {error.message}") from error


def save_weights(path: Path, checkpoint: Checkpoint, half: bool = False) -> None:
    """Writes a checkpoint without what only training needs, as `.pt` or `.safetensors` by the path's ending.

    Args:
        path: where to.
        checkpoint: any that was loaded.
        half: store the weights in float16; they are float32 again when loaded.

    Raises:
        BadInput: a weight is too large for float16.
        RunFailed: it cannot be written.
    """
    dtype = torch.float16 if half else torch.float32
    weights = {}
    for key, value in checkpoint.model.state_dict().items():
        weights[key] = value.to("cpu", dtype).contiguous()
        if half and (value.isfinite().cpu() & ~weights[key].isfinite()).any():
            raise BadInput(f"{key}: {float(value.abs().max()):g} is too large for half precision", "leave out --half")
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "config": configuration.to_dict(checkpoint.config),
        "step": checkpoint.step,
        "ema": weights,
    }
    content["digest"] = _digest(content)
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            del content["ema"]
            # Not by `save_file`, whose files nobody but the owner may read.
            temporary.write_bytes(save(weights, metadata={FORMAT: json.dumps(content)}))
        else:
            with temporary.open("wb") as file:
                torch.save(content, file)
        _check_own(_load(temporary), temporary)


def read_state(path: Path) -> dict[str, Any]:
    """The checked content of an own checkpoint that training can go on from; tensors are mapped, not copied.

    Raises:
        BadInput: missing, truncated, changed, hostile, not of this program, or weights only.
    """
    with _refusing(path):
        content: dict[str, Any] = _load(path)
        if content_format(content, path) != FORMAT:
            raise BadInput(f"{path}: written by another program", "fdm train --init-from starts a new run from it")
        _check_own(content, path)
    if _holds(content, _TRAINING) is not None:
        raise BadInput(f"{path}: holds weights only", "fdm train --init-from starts a new run from it")
    return content


def _holds(content: Mapping[str, Any], kinds: Mapping[str, type]) -> str | None:
    """The first key that is missing or of another kind."""
    return next((key for key, kind in kinds.items() if not isinstance(content.get(key), kind)), None)


def _check_own(content: dict[str, Any], path: Path) -> None:
    """Version, digest and shape of an own file; takes the digest out."""
    if content.get("version") != VERSION:
        raise BadInput(f"{path}: checkpoint version {content.get('version')!r}; this fdm reads version {VERSION}")
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise BadInput(f"{path}: corrupt: its content does not match its digest")
    if (key := _holds(content, {"config": dict, "step": int, "ema": dict})) is not None:
        raise BadInput(f"{path}: not a complete checkpoint: no {key}")
    for key in ("step", "ema_updates"):
        if content.get(key, 0) < 0:
            raise BadInput(f"{path}: not a complete checkpoint: {key} is {content[key]}")
    for key in {"model", "ema"} & content.keys():
        if not predecessors.are_weights(content[key]):
            raise BadInput(f"{path}: not a complete checkpoint: {key} is no set of named tensors")


def _load_safetensors(path: Path) -> Any:
    """The same content as a `.pt` of weights only."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if FORMAT not in metadata:
            raise BadInput(f"{path}: weights without their configuration", "fdm checkpoint convert writes both")
        content = json.loads(metadata[FORMAT])
        content["ema"] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    return content


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever a mutated or hostile file raises in what reads it ends as BadInput."""
    try:
        yield
    except FdmError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"no such file: {path}") from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder, not a checkpoint file") from None
    except PermissionError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except zipfile.BadZipFile:
        raise BadInput(f"{path}: not a checkpoint, or cut short") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno in PASSING:
            raise RunFailed(f"cannot read {path}: {error.strerror}", "try again once it can be read") from None
        reason = str(error).split("\n")[0]
        raise BadInput(f"{path}: not a checkpoint that can be read safely: {reason[:200]}") from error


def _load(path: Path) -> Any:
    """Unpickles with every guard."""
    refuse_unencodable(path)
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a device may have no end, a pipe no beginning
        raise BadInput(f"{path}: not a regular file")
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":  # after eight bytes of length, a header in JSON
            content = _load_safetensors(path)
        else:
            _check_zip(path)
            refuse_bombs(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    _refuse_claims(content, path)
    return content


def _check_zip(path: Path) -> None:
    """Refuses an archive that is compressed, damaged or larger than its file."""
    overlap = BadInput(f"{path}: not the archive of a checkpoint: its entries overlap, or something precedes them")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise BadInput(f"{path}: holds compressed entries, which a checkpoint never does")
        first = min((entry.header_offset for entry in entries), default=-1)
        if sum(entry.file_size for entry in entries) > path.stat().st_size or first != 0:
            raise overlap
        broken = archive.testzip()
        if broken is not None:
            raise BadInput(f"{path}: corrupt: the checksum of {broken} does not match")
    # What counts is what PyTorch will load: it must not see other entries than Python.
    if not (_ends_with_directory(path) and all(map(_is_plain, entries))):
        raise overlap
    if any(entry.orig_filename.lower().endswith("/data.pkl") and entry.file_size > MOST_BYTES for entry in entries):
        raise BadInput(f"{path}: its structure alone takes more than {MOST_BYTES:,} bytes")
    if len(torch._C.PyTorchFileReader(str(path)).get_all_records()) != len(entries):
        raise overlap


def _is_plain(entry: zipfile.ZipInfo) -> bool:
    """Whether all who read an archive's entry see the same: a file, with nothing beside it but 64-bit sizes, once.

    Of two fields of sizes Python takes both, PyTorch the first (APPNOTE.TXT, 4.5.3); another may give another name.
    """
    ID, FOLDER = b"\1\0", 0x10
    sizes = not entry.extra or (
        entry.extra[:2] == ID and int.from_bytes(entry.extra[2:4], "little") + 4 == len(entry.extra)
    )
    is_file = not entry.is_dir() and not entry.external_attr & FOLDER
    return sizes and is_file and entry.compress_size == entry.file_size


def _ends_with_directory(path: Path) -> bool:
    """Whether a zip archive has its directory where all who look for it find the same one.

    That is at its end, with no comment, and as its 64-bit record says if it has one. Elsewhere Python and PyTorch may
    find two, of which one was not checked (PKWARE, APPNOTE.TXT, 4.3.14 to 4.3.16).
    """
    record64, locator, record = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL"), struct.Struct("<4s4H2LH")
    length = record64.size + locator.size + record.size
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - length))
        tail = file.read().rjust(length, b"\0")
    signature, *_, size, start, comment = record.unpack(tail[-record.size :])
    signature64, _, position, _ = locator.unpack_from(tail, record64.size)
    end -= record.size
    if signature64 == b"PK\6\7":
        found, *_, size, start = record64.unpack_from(tail)
        end -= record64.size + locator.size
        if found != b"PK\6\6" or position != end:
            return False
    return signature == b"PK\5\6" and not comment and start + size == end


def _refuse_claims(content: Any, path: Path) -> None:
    """Refuses what a file of its length cannot hold.

    Tensors that claim more than their storage holds (stride tricks); many that share a storage; and containers that
    share theirs, so that a walk through all would not end.
    """
    values, claimed, most = 0, 0, 4 * path.stat().st_size

    def walk(value: Any, depth: int) -> None:
        nonlocal values, claimed
        values += 1
        if values > _MOST_VALUES or depth > _DEEPEST:
            raise BadInput(f"{path}: holds more values than a checkpoint does, or deeper nested ones")
        if isinstance(value, Tensor):
            claimed += value.nbytes
            if value.nbytes > value.untyped_storage().nbytes():
                raise BadInput(f"{path}: a tensor claims {value.numel()} elements that the file does not hold")
        elif isinstance(value, dict):
            if getattr(value, "__dict__", {}).keys() - {"_metadata"}:
                raise BadInput(f"{path}: holds a dict with attributes, which could pass for its methods")
            for key, item in value.items():
                walk(key, depth + 1)
                walk(item, depth + 1)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item, depth + 1)
        elif isinstance(value, str):
            claimed += len(value)
        elif not isinstance(value, int | float | None):
            raise BadInput(f"{path}: holds a {type(value).__name__}, which no checkpoint does")
        if claimed > most:
            raise BadInput(f"{path}: claims more content than the file holds")

    walk(content, 0)


def _digest(value: Any) -> str:
    """sha256 over a canonical walk: types, keys, shapes and bytes."""
    digest = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            data = value.detach().cpu().contiguous()
            if data.numel():
                digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)};".encode())
            for key in sorted(value, key=repr):
                walk(key)
                walk(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)};".encode())
            for item in value:
                walk(item)
        else:
            digest.update(f"{type(value).__name__} {value!r};".encode())

    walk(value)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
