"""How much memory this process holds, and held at most."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. Host memory is the resident set; device memory is what torch allocated on the CUDA device."""

    now: int
    peak: int
    device_now: int | None = None
    device_peak: int | None = None


def memory_use(device: str = "cpu") -> MemoryUse:
    """What this process uses now and used at most since it started; `device` as in `RunStarted.device`."""
    now = psutil.Process().memory_info().rss
    peak = max(now, _peak_resident())
    if not device.startswith("cuda"):
        return MemoryUse(now, peak)
    import torch  # only whoever trains on a GPU has come here; readers of a run need no torch

    return MemoryUse(now, peak, torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))


def _peak_resident() -> int:
    # getrusage's ru_maxrss survives exec on Linux: a small process started by a large one reports the large
    # one's peak. VmHWM belongs to this program alone.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
