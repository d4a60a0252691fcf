"""The device that a command computes on."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdm_cli.errors import BadInput


def choose_device(name: str, threads: int | None = None, *, exact: bool = False) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `mps`; sets the number of CPU threads when given.

    `auto` is CUDA where there is one, else the CPU. Not MPS: nobody has tried that, and of PyTorch 2.13 it is reported
    that some convolutions give wrong numbers there without a word.

    With `exact`, fp32 is that on newer GPUs, too, and not rounded to TF32, which is for training.

    Raises:
        BadInput: the device is not there.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if exact:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False  # an environment variable of NVIDIA's images turns it on
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if not available[name]:
        raise BadInput(f"no {name} device here", "use --device cpu")
    return torch.device(name)


def check_precision(precision: str, device: torch.device) -> None:
    """Raises BadInput when the device cannot compute in `bf16` or `fp16`, or only by emulation."""
    if precision == "fp32":
        return
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    hint = "--precision fp16" if precision == "bf16" and device.type == "cuda" else "--precision fp32"
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise BadInput(f"this {device.type} device computes {precision} only by emulation", hint)
    x = torch.ones(1, 8, 4, 4, device=device, requires_grad=True)
    try:
        with torch.autocast(device.type, dtype):
            F.conv2d(x, torch.ones(8, 8, 3, 3, device=device)).float().sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:100]
        raise BadInput(f"this {device.type} device cannot compute in {precision}: {reason}", hint) from None


def emulates(precision: str, device: torch.device) -> bool:
    """Whether this CPU computes in `bf16` or `fp16` in software: without AVX-512 a step takes four times as long."""
    return precision != "fp32" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
