"""What CUDA's caching allocator does to steps of many lengths, and what mends it.

It keeps blocks of the sizes it was asked for, and a step of another length fits into none of them: memory that is
free and of no use, up to an out-of-memory error beside gigabytes of it. Segments that grow (CUDA's virtual memory)
leave no such pieces. By torch's documentation; no card has run it here.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

_DRIVER = Path("/dev/nvidiactl")
"""There with NVIDIA's driver for Linux itself; under WSL and with ROCm, which know no such segments, it is not."""
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where people say how torch allocates; older releases know the second name alone."""


def use_expandable_segments(environment: MutableMapping[str, str] = os.environ, driver: Path = _DRIVER) -> bool:
    """Process-wide, before torch first allocates on a device; for a command's process, never in a library call. False,
    and nothing is changed, where a person has said how, or the driver knows no such segments."""
    if any(name in environment for name in _SETTINGS) or not driver.exists():
        return False
    environment[_SETTINGS[-1]] = "expandable_segments:True"
    return True
