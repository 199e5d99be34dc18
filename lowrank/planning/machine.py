"""The memory that this process could have, on the host and on the device that computes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lowrank.kernels.accelerators import has_memory_of_its_own


@dataclass(frozen=True)
class Machine:
    """Bytes. `host` and `device` count what this process holds already; `device` is None where the host computes."""

    host: int
    host_total: int
    device: int | None = None
    device_total: int | None = None


def this_machine(device: torch.device) -> Machine:
    """What is free now, within the limits of a container."""
    memory = psutil.virtual_memory()
    resident = psutil.Process().memory_info().rss
    total, free = memory.total, memory.available
    limit, used = _container()
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - used)
    free = free // _processes() + resident
    if not has_memory_of_its_own(device):
        return Machine(free, total)
    torchs = torch.cuda if device.type == "cuda" else torch.xpu
    device_free, device_total = torchs.mem_get_info(device)
    return Machine(free, total, device_free + torchs.memory_reserved(device), device_total)


def of_gpus(device: int) -> Machine:
    """A machine with GPUs of so many bytes, which need not be this one; of its host nothing is known."""
    return Machine(0, 0, device, device)


def _processes() -> int:
    """Those of this run on this machine, as their launcher has put it into the environment; they share the host."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(given)) if given.isdecimal() else 1


def _container() -> tuple[int | None, int]:
    """(limit, used) of this process's control group (version 2, then 1); (None, 0) where there is none."""
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            text = Path(limit).read_text().strip()
            return (None, 0) if text == "max" else (int(text), _used(usage))
        except (OSError, ValueError):
            continue
    return None, 0


def _used(usage: str) -> int:
    """Bytes that cannot be had back: without the files' pages that the system keeps while nobody wants them."""
    used = int(Path(usage).read_text())
    try:
        lines = (Path(usage).parent / "memory.stat").read_text().splitlines()
    except OSError:
        return used
    inactive = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return max(0, used - inactive)
