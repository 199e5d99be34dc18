"""Where lowrank keeps what it can make again: compiled kernels and, where asked for, quantized models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """LOWRANK_CACHE, or `lowrank` in the user's cache folder. It need not exist yet."""
    named = os.environ.get("LOWRANK_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank"
