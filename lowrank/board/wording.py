"""Quantities as a person reads them on a page; the same in both languages."""

from __future__ import annotations

import math
import time
from typing import Any

from lowrank.report import formatting


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def duration(seconds: Any) -> str:
    """`42 s`, `3:07`, `2:05:09` or `1 d 04:10`; an en dash where it is not known."""
    return formatting.duration(seconds, space=" ") if _is_number(seconds) else "–"


def size(number: Any) -> str:
    """`950 B`, `12 kB`, `512 MB`, `2.1 GB`; in steps of 1000, as disks are sold."""
    if not _is_number(number):
        return "–"
    for unit, large in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= large:
            value = number / large
            return f"{value:.1f} {unit}" if unit == "GB" and value < 100 else f"{value:.0f} {unit}"
    return f"{number:.0f} B"


def count(number: Any) -> str:
    """`950`, `12,345`, `4.2 M` or `1.3 B`."""
    return formatting.count(number) if _is_number(number) else "–"


def loss(value: Any) -> str:
    """Four digits."""
    if not _is_number(value):
        return str(value) if isinstance(value, float) else "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def when(moment: float | None) -> str:
    """`18:05` today, else `2026-11-29 18:05`."""
    if not moment:
        return "–"
    local = time.localtime(moment)
    today = time.strftime("%Y-%m-%d") == time.strftime("%Y-%m-%d", local)
    return time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", local)


def short(text: Any, most: int = 2000) -> str:
    """A long text cut, which is said."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} […{len(text) - most}]"


FILTERS = {"duration": duration, "size": size, "count": count, "loss": loss, "when": when, "short": short}
"""For the templates."""
