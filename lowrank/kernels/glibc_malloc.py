"""Settings of glibc's malloc for a training loop on a CPU.

By default it gives large blocks back to the system at once, and every new one costs page faults: a step frees and
takes the same tens of megabytes hundreds of times, and touching fresh pages costs more than the arithmetic
on them. So freed memory is kept. But steps of many lengths leave fragments, and the process would grow by half within a
hundred steps; so when it has grown, everything unused is given back once, and always between the large passes of one
step, whose gradients stay. docs/log.md has the numbers.

And torch asks for aligned blocks: glibc cuts such a block out of a larger hole and frees the slivers at its ends, which
its cache of small blocks hands to whoever wants a few bytes. From then on the block's place, freed, is a sliver too
small for another block of its size. Without that cache the slivers join the hole again, and a step needs up to a fifth
less memory. The cache can only be left out when a process starts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

import psutil

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NO_CACHE = "glibc.malloc.tcache_count=0"
_GROWTH = 1.25
"""Resident memory may grow by this over that of a step on a clean heap."""


def keep_freed_memory() -> bool:
    """Process-wide, harmless to call again; for a command's process, never in a library call. False where the C
    library is not glibc; nothing is changed there."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 << 20}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())


def start_again_without_cache() -> None:
    """Become the same command with a malloc that has no cache of small blocks; returns where it is so already, or the
    C library is not glibc. For the first line of a command, before anything is imported that takes time."""
    added = without_cache()
    if platform.libc_ver()[0] != "glibc" or not added:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})


def without_cache() -> dict[str, str]:
    """What a process that trains is given in its environment; nothing where a person has set that already."""
    given = os.environ.get("GLIBC_TUNABLES", "")
    if "malloc.tcache_count" in given:
        return {}
    return {"GLIBC_TUNABLES": f"{given}:{_NO_CACHE}" if given else _NO_CACHE}


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
