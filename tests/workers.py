"""How many tests run at once: one on each core, 3 GB of memory for each, two at least.   python tests/workers.py"""

from __future__ import annotations

import os

_GB_EACH = 3


def workers(cores: int, memory: float) -> int:
    """`memory`: of the machine, in bytes."""
    return max(2, min(cores, int(memory / 1e9 / _GB_EACH)))


def _memory() -> float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # systems that do not say
        return 0


if __name__ == "__main__":
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    print(workers(usable, _memory()))
