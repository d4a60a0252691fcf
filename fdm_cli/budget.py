"""How much memory there is: on the command line, on a GPU, on this machine or in its container."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fdm_cli.errors import BadInput

if TYPE_CHECKING:
    import torch

UNITS = {"B": 1}
UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
T4_USABLE = 29 * 2**29  # 14.5 GiB: what a Tesla T4, sold as 16 GB, leaves to programs
UNLIMITED = 2**60  # version 1 control groups without a limit give a number near 2**63


@dataclass(frozen=True)
class Budget:
    """Memory that may be used.

    Attributes:
        size: bytes.
        source: where the number comes from, for a sentence such as `16.0 GB (--memory-budget)`.
    """

    size: int
    source: str


def parse_size(text: str) -> int:
    """Bytes of `16GB`, `14.5 GiB` or `800 MB`; GB is 10^9 as in what is sold, GiB is 2^30; letters in any case.

    Raises:
        BadInput: no number, no unit, or nothing left of it.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]+)\s*", text)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise BadInput(f"{text!r} is no amount of memory", f"for example 16GB; units: {', '.join(UNITS)}")
    size = int(float(match[1]) * units[match[2].lower()])
    if size < 1:
        raise BadInput(f"{text!r} is no memory at all", "for example 16GB")
    return size


def available(device: torch.device, root: Path = Path("/")) -> Budget | None:
    """What is free on a device now; on a CPU (or mps, which shares it) the machine's RAM, or the container's.

    Under torchrun the processes of one machine share its RAM evenly.

    Args:
        device: CUDA, or any other for the RAM.
        root: of the file system with /proc and /sys.

    Returns:
        None when the system does not say.
    """
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return Budget(free, f"free on {torch.cuda.get_device_name(device)}")
    found = [budget for budget in (_machine(root), *_control_groups(root)) if budget is not None]
    if not found:
        return None
    least = min(found, key=lambda budget: budget.size)
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Budget(least.size // sharers, least.source + (f", shared by {sharers} processes" if sharers > 1 else ""))


def _machine(root: Path) -> Budget | None:
    """Linux: what can be had without swapping. Elsewhere: all there is."""
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return Budget(int(value.split()[0]) * 1024, "RAM available here")
    except (OSError, ValueError, IndexError):
        pass
    if root != Path("/") or not hasattr(os, "sysconf"):
        return None
    try:
        return Budget(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "RAM of this machine")
    except (ValueError, OSError):
        return None


def _control_groups(root: Path) -> Iterator[Budget | None]:
    """What is left in each control group that this process is in, version 1 and 2, up to the outermost.

    Inside a container the paths in /proc may be the host's and lead nowhere; the container's own limit then
    stands at the top of the mount, which is looked at in any case.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        files = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield _left_in(mount.joinpath(*parts[:depth]), *files)


def _left_in(group: Path, limit_file: str, usage_file: str, reclaimable: str) -> Budget | None:
    """Limit minus usage, where pages of files that can be dropped do not count as used; None without a limit."""
    try:
        limit = int((group / limit_file).read_text())  # "max" is no number
        if limit >= UNLIMITED:
            return None
        used = int((group / usage_file).read_text())
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == reclaimable:
                used -= int(value)
    except (OSError, ValueError):
        return None
    return Budget(max(limit - max(used, 0), 0), "left of this container's memory limit")
