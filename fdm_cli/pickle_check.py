"""What the pickle in a checkpoint would do, found out without doing it.

PyTorch's own safe loader runs no code of a file's choosing. But among the functions that it allows are some that fill
any memory from a few bytes (`bytearray`, `torch.Tensor`, `codecs.encode`), and tuples nested or shared deeply enough
hang or crash the interpreter when they become a key. A checkpoint needs none of that.
"""

from __future__ import annotations

import pickletools

# A full training state of 400 weights takes 150,000 bytes; a million take about a second here.
MOST_BYTES = 4 << 20
DEEPEST_TUPLE = 16  # of tensors: 3
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
_KNOWN = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    *(f"torch {name}Storage" for name in _STORAGES),
}
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_MARK = -1


def refuse_bombs(data: bytes) -> None:
    """Raises ValueError, with a reason, for a pickle that does more than build dicts, lists, numbers and tensors.

    Args:
        data: the pickle.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"its structure alone takes {len(data):,} bytes, at most {MOST_BYTES:,} are read")
    stack: list[int] = []  # for every value the tuples nested in it, as deep as they go
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and argument not in _KNOWN:
            raise ValueError(f"it calls {str(argument).replace(' ', '.')}, which no checkpoint needs")
        if opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
            continue
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
            continue
        taken = []
        below = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            below = opcode.stack_before.index(pickletools.markobject)
            while (value := stack.pop()) != _MARK:
                taken.append(value)
        taken += [stack.pop() for _ in range(below)]
        depth = max(taken, default=0) + (opcode.name in _TUPLES)
        if depth > DEEPEST_TUPLE:
            raise ValueError("it nests tuples deeper than any checkpoint does")
        stack += [_MARK if after is pickletools.markobject else depth for after in opcode.stack_after]
