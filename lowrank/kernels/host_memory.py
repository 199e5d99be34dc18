"""What glibc's allocator does to a training loop on a CPU, and the two calls that mend it.

It gives large blocks back to the system at once, and every new one costs page faults: a step frees and
takes the same tens of megabytes hundreds of times, and touching fresh pages costs more than the arithmetic
on them. So freed memory is kept. But steps of many lengths leave fragments, and the process would grow by half within a
hundred steps; so when it has grown, everything unused is given back once. docs/log.md has the numbers.
"""

from __future__ import annotations

import ctypes
import platform

import psutil

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_GROWTH = 1.25
"""Resident memory may grow by this over that of a step on a clean heap."""


def keep_freed_memory() -> bool:
    """Process-wide, harmless to call again. False where the C library is not glibc; nothing is changed there."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 << 20}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())


class Heap:
    """Watches the process between steps and gives unused memory back when fragments have piled up."""

    def __init__(self) -> None:
        self._trim = ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else None
        self._process = psutil.Process()
        self._usual = 0
        """Resident bytes after a step on a clean heap; 0 right after a trim."""

    def after_step(self) -> bool:
        """Call between steps, when little is alive; True if memory was given back."""
        if self._trim is None:
            return False
        resident = self._process.memory_info().rss
        if not self._usual:
            self._usual = resident
        if resident <= _GROWTH * self._usual:
            return False
        self.trim()
        return True

    def trim(self) -> None:
        """Give back what is unused now; what is left, after the next step, is the usual."""
        if self._trim is not None:
            self._trim(0)
        self._usual = 0
