"""Unsloth's module of that name: what it has is refused in words."""

from __future__ import annotations

from typing import Any

_ELSEWHERE = {
    "SyntheticDataKit": "it drives a vLLM server; run synthetic-data-kit by itself and load the rows it writes",
    "RawTextDataLoader": "texts are read by `datasets`, or by `lowrank train`",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise ImportError(f"{name}: {_ELSEWHERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
