"""Tensors without memory, and the count of the bytes that they would take.

A ghost says that it lies on the CPU, and every operator that reaches it is carried out on PyTorch's `meta` device:
shapes, strides and types are worked out, no number is computed and no memory is taken. Autograd, autocast, the
optimizer and the network run as they are. This is the idea of PyTorch's own `FakeTensorMode`, in a small fraction of
its time, so that each run can start with such a step.

Only what the operators return is counted. What a kernel takes and gives back within itself is not seen.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

_META = torch.device("meta")
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class _Held(weakref.ref[Any]):
    """A storage, for as long as it lives; and what it was afterwards."""

    key: int
    size: int


class Ledger:
    """The bytes alive in the ghosts of one experiment.

    Attributes:
        history: bytes alive after each allocation, since the last `forget`.
        results: what operators returned for arguments of these shapes; a network repeats itself.
    """

    def __init__(self) -> None:
        self.history: list[int] = []
        self.results: dict[Any, Any] = {}
        self._alive = 0
        self._storages: dict[int, _Held] = {}
        self._gone: list[_Held] = []

    @property
    def alive(self) -> int:
        """Bytes of all storages that something still refers to."""
        while self._gone:
            gone = self._gone.pop()
            del self._storages[gone.key]
            self._alive -= gone.size
        return self._alive

    def forget(self) -> None:
        """Starts a new history."""
        self.history = [self.alive]

    def count(self, meta: Tensor) -> None:
        """Counts the storage of a meta tensor, once, until it is given up."""
        alive = self.alive  # first of all: the storage may have the key of one that has gone
        storage = meta.untyped_storage()
        if storage._cdata in self._storages:
            return
        # No function of Python is called when a storage goes: what the handler of a signal raised in it would be lost.
        held = _Held(storage, self._gone.append)
        held.key, held.size = storage._cdata, storage.nbytes()
        self._storages[held.key] = held
        self._alive = alive + held.size
        self.history.append(self._alive)


class Ghost(Tensor):
    """A tensor that says it lies on the CPU and has no content; see the module."""

    meta: Tensor
    ledger: Ledger

    @staticmethod
    def __new__(cls: type[Ghost], meta: Tensor, ledger: Ledger) -> Ghost:
        """A ghost of the shape, strides and type of a tensor on the meta device."""
        ghost: Ghost = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
        )
        ghost.meta, ghost.ledger = meta, ledger
        ledger.count(meta)
        return ghost

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carries out one operator on the meta device. Plain tensors among the arguments are small: not counted."""
        kwargs = kwargs or {}
        nature = _nature(function)
        if nature == "changes its first argument":
            return args[0] if function._schema.returns else None
        ghosts: list[Ghost] = []
        inner = [_to_meta(value, ghosts) for value in args]
        named = {key: _to_meta(value, ghosts) for key, value in kwargs.items()}
        ledger = ghosts[0].ledger
        if nature == "returns a view":
            return _to_ghosts(function(*inner, **named), ledger)
        key = (function, *map(_shape_of, inner), *((name, _shape_of(value)) for name, value in named.items()))
        if key in ledger.results:
            return _to_ghosts(_again(ledger.results[key]), ledger)
        result = function(*inner, **named)
        if function in _CONVOLUTIONS:
            result = _channels_last(result)
        if not _storages(result) & _storages(inner):
            ledger.results[key] = _recipe(result)
        return _to_ghosts(result, ledger)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ghost:
        """A ghost of the same ledger, as the EMA asks for one."""
        copy = self.detach().clone()
        copied: Any = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:  # type: ignore[override]
        """Its shape and type; it has no content."""
        return f"Ghost({tuple(self.shape)}, {self.dtype})"


@cache
def _nature(function: Any) -> Literal["changes its first argument", "returns a view", "makes something new"]:
    """What an operator's schema promises."""
    schema = function._schema
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    if any(written):
        returned = [value.alias_info is not None for value in schema.returns]
        plain = written[0] and returned in ([], [True]) and torch.Tag.inplace_view not in function.tags
        return "changes its first argument" if plain else "returns a view"
    viewed = any(value.alias_info is not None for value in schema.returns)
    return "returns a view" if viewed else "makes something new"


def _to_meta(value: Any, ghosts: list[Ghost]) -> Any:
    if isinstance(value, Ghost):
        ghosts.append(value)
        return value.meta
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    if isinstance(value, list | tuple):
        return type(value)([_to_meta(item, ghosts) for item in value])
    return _META if isinstance(value, torch.device) else value


def _to_ghosts(value: Any, ledger: Ledger) -> Any:
    if isinstance(value, Tensor):
        return Ghost(value, ledger)
    if isinstance(value, list | tuple):
        return type(value)([_to_ghosts(item, ledger) for item in value])
    return value


def _channels_last(value: Any) -> Any:
    """As the network's convolutions leave their results, but for meta tensors."""
    if isinstance(value, Tensor):
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
    return tuple(map(_channels_last, value)) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class _Shape:
    """What an operator's result depends on in a tensor without content."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _shape_of(value: Any) -> Any:
    """A hashable description; 1, 1.0 and True differ in it."""
    if isinstance(value, Tensor):
        return _Shape(value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_shape_of, value))
    return value if value is None or isinstance(value, torch.dtype) else (type(value).__name__, value)


def _recipe(value: Any) -> Any:
    """What `_again` makes the same result of."""
    if isinstance(value, list | tuple):
        return type(value)(map(_recipe, value))
    return _shape_of(value) if isinstance(value, Tensor) else value


def _again(recipe: Any) -> Any:
    """New tensors of the shapes that an operator returned before."""
    if isinstance(recipe, _Shape):
        return torch.empty_strided(recipe.shape, recipe.stride, dtype=recipe.dtype, device=_META)
    if isinstance(recipe, list | tuple):
        return type(recipe)(map(_again, recipe))
    return recipe


def _storages(value: Any) -> set[int]:
    if isinstance(value, Tensor):
        return {value.untyped_storage()._cdata}
    return set().union(*map(_storages, value)) if isinstance(value, list | tuple) else set()


def empty(ledger: Ledger, *shape: int, dtype: torch.dtype = torch.float32) -> Ghost:
    """A ghost of a shape."""
    return Ghost(torch.empty(shape, dtype=dtype, device=_META), ledger)


def haunt(model: nn.Module, ledger: Ledger) -> None:
    """Replaces a module's parameters and buffers, which lie on the meta device, by ghosts."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(Ghost(parameter.detach(), ledger), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, Ghost(buffer, ledger))
