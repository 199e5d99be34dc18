"""glibc gives large blocks back to the system at once, and every new one costs page faults.

A training step frees and takes the same tens of megabytes hundreds of times; touching the fresh pages
costs more than the arithmetic on them (docs/log.md has the measurement). `keep_freed_memory` tells the
allocator to keep what was freed for the next request.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Process-wide, harmless to call again. False where the C library is not glibc; nothing is changed there."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 << 20}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())
