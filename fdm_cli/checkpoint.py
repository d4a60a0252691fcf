"""Checkpoint files: self-describing, written whole or not at all, checked when read.

A file is a zip that `torch.save` made of plain types and tensors only:

    {"format": "fdm", "version": 1, "config": {...}, "step": n,
     "model": {...}, "ema": {...}, "ema_updates": n, "optimizer": {...}, "digest": "sha256 of all of the above"}

Nothing in it is ever executed (`weights_only=True`); a flipped bit, a compressed bomb and a tensor that
claims more elements than the file holds are refused before anything is computed with them.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdm_cli import config as configuration
from fdm_cli.config import Config
from fdm_cli.diffusion import Process
from fdm_cli.errors import BadInput, FdmError, RunFailed
from fdm_cli.files import replacing
from fdm_cli.unet import UNet

FORMAT, VERSION = "fdm", 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint ready to sample from.

    Attributes:
        config: the run's whole configuration.
        step: training steps done.
        process: the diffusion process it was trained on.
        model: the network with its EMA weights, in eval mode.
        sha256: of the file.
    """

    config: Config
    step: int
    process: Process
    model: UNet
    sha256: str


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads a checkpoint for sampling.

    Raises:
        BadInput: missing, corrupt or hostile file, or weights that do not fit the configuration in it.
    """
    path = Path(path)
    state = read_state(path)
    config = configuration.from_dict(state["config"], str(path))
    return Checkpoint(
        config=config,
        step=state["step"],
        process=Process(config.diffusion),
        model=build_model(config, state["ema"], path).to(device).eval(),
        sha256=file_sha256(path),
    )


def build_model(config: Config, weights: Mapping[str, Tensor], path: Path) -> UNet:
    """The configuration's network with these weights.

    Shapes are compared before any memory is taken, so that a file cannot claim a larger network than it holds.

    Raises:
        BadInput: naming the first key that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = UNet(config)
    expected = model.state_dict()
    for key, value in expected.items():
        if key not in weights:
            raise BadInput(f"{path}: the weights do not fit its configuration: {key} is missing")
        if weights[key].shape != value.shape or weights[key].dtype != value.dtype:
            raise BadInput(
                f"{path}: the weights do not fit its configuration: {key} is "
                f"{_shape(weights[key])}, the configuration says {_shape(value)}"
            )
    for key in weights:
        if key not in expected:
            raise BadInput(f"{path}: the weights do not fit its configuration: {key} is not part of it")
    # The file is mapped into memory; the model must outlive it.
    model.load_state_dict({key: value.clone() for key, value in weights.items()}, assign=True)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes `{"config", "step", "model", "ema", "optimizer"}` to a temporary file, verifies it, renames it.

    Raises:
        RunFailed: the file cannot be written (disk full, no permission); an older file of that name is intact.
    """
    content = {"format": FORMAT, "version": VERSION, **state}
    content["digest"] = _digest(content)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(content, file)
        try:
            read_state(temporary)
        except BadInput as error:
            raise RunFailed(f"cannot write {path}: what was written is broken; {error.message}") from error


def read_state(path: Path) -> dict[str, Any]:
    """The checked content of a checkpoint file; tensors are mapped from the file, not copied.

    Raises:
        BadInput: missing, truncated, changed, hostile, or not a checkpoint of this program.
    """
    content = _load(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"{path}: not a checkpoint of fdm")
    if content.get("version") != VERSION:
        raise BadInput(f"{path}: checkpoint version {content.get('version')!r}; this fdm reads version {VERSION}")
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise BadInput(f"{path}: corrupt: its content does not match its digest")
    kinds = {"config": dict, "step": int, "model": dict, "ema": dict, "ema_updates": int, "optimizer": dict}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise BadInput(f"{path}: not a complete checkpoint: no {key}")
    for key in ("model", "ema"):
        if not all(isinstance(value, Tensor) for value in content[key].values()):
            raise BadInput(f"{path}: not a complete checkpoint: {key} holds something that is no tensor")
    return content


def _load(path: Path) -> Any:
    """Unpickles with every guard; whatever a mutated file raises inside torch ends as BadInput."""
    if not path.exists():
        raise BadInput(f"no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise BadInput(f"{path}: holds compressed entries, which a checkpoint never does")
            broken = archive.testzip()
        if broken is not None:
            raise BadInput(f"{path}: corrupt: the checksum of {broken} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _refuse_claims(content, path)
    except FdmError:
        raise
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder, not a checkpoint file") from None
    except zipfile.BadZipFile:
        raise BadInput(f"{path}: not a checkpoint, or cut short") from None
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise BadInput(f"{path}: not a checkpoint that can be read safely: {reason[:200]}") from None
    return content


def _refuse_claims(value: Any, path: Path) -> None:
    """Refuses tensors whose shape claims more than their storage holds (stride tricks)."""
    if isinstance(value, Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise BadInput(f"{path}: a tensor claims {value.numel()} elements that the file does not hold")
    elif isinstance(value, dict):
        for item in value.values():
            _refuse_claims(item, path)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_claims(item, path)


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
            for key, item in value.items():
                walk(key)
                walk(item)
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
