"""What the pickle in a checkpoint would do, found out without doing it.

PyTorch's own safe loader runs no code of a file's choosing. But among the functions that it allows are some that fill
any memory from a few bytes (`bytearray`, `torch.Tensor`, copies of an `OrderedDict`), and a tuple of tuples of tuples
takes for ever to be hashed when it is a key. A checkpoint needs none of that.
"""

from __future__ import annotations

import pickletools

# A full training state of 400 weights takes 150,000 bytes, and a tenth of a second here.
MOST_BYTES = 4 << 20
MOST_IN_A_TUPLE = 100  # values, those of tuples within it counted; a tensor's arguments are about 20
MOST_STATES = 16  # objects with attributes: an OrderedDict of weights has some
_ORDERED = "collections OrderedDict"
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
_KNOWN = {
    _ORDERED,
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}Storage" for name in _STORAGES),
}
_MARK = "mark"


def refuse_bombs(data: bytes) -> None:
    """Raises ValueError, with a reason, for a pickle that does more than build dicts, lists, numbers and tensors."""
    try:
        _walk(data)
    except (KeyError, IndexError) as error:
        raise ValueError(f"its pickle is broken ({type(error).__name__})") from None


def _walk(data: bytes) -> None:
    """A pickle is a program for a machine with a stack: here it runs on the sizes of its tuples, and on names."""
    stack: list[int | str] = []  # 1 for a value, 0 or more for a tuple; what is to be called, by its name
    memo: dict[int, int | str] = {}
    states = 0
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "GLOBAL":
            if argument not in _KNOWN:
                raise ValueError(f"it calls {str(argument).replace(' ', '.')}, which no checkpoint needs")
            stack.append(str(argument))
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        else:
            below = len(opcode.stack_before)
            taken: list[int | str] = []
            if pickletools.markobject in opcode.stack_before:
                below = opcode.stack_before.index(pickletools.markobject)
                while (value := stack.pop()) != _MARK:
                    taken.append(value)
            taken += [stack.pop() for _ in range(below)]
            size = 0 if name == "EMPTY_TUPLE" else 1
            if "TUPLE" in name:
                size += sum(value if isinstance(value, int) else 1 for value in taken)
            states += name == "BUILD"
            # What REDUCE takes are the arguments, then the function; PyTorch fills an OrderedDict afterwards.
            copies = name == "REDUCE" and taken[1] == _ORDERED and taken[0] != 0
            if size > MOST_IN_A_TUPLE or states > MOST_STATES or copies:
                raise ValueError("it builds what no checkpoint needs")
            if name.startswith("LONG") and abs(int(argument or 0)) >> 63:
                raise ValueError("it holds a number that is larger than any in a checkpoint")
            stack += [size] * len(opcode.stack_after)
