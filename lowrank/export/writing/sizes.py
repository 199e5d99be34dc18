"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes: `5GB` is 5e9, `5GiB` is 5 * 2**30, as in transformers. ValueError says what was expected."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or match[1].count(".") > 1 or float(match[1]) <= 0:
        raise ValueError(f"expected a size like 500MB or 5GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(size: float) -> str:
    """`1.2 GB`."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_:
            return f"{size / bytes_:.1f} {unit}" if size < 100 * bytes_ else f"{size / bytes_:.0f} {unit}"
    return f"{size:.0f} bytes"
