"""Quantities as a person reads them: durations, memory, counts, losses."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any


def duration(seconds: float | None, space: str = "") -> str:
    """`42s`, `3:07` (minutes:seconds), `2:05:09` or `1d 04:10`; `-` where it is not known. `space`: before a unit."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}{space}s"
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minute}:{second:02d}"
    days, hour = divmod(hours, 24)
    return f"{days}{space}d {hour:02d}:{minute:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def rough_duration(seconds: float) -> str:
    """Of an estimate: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def gigabytes(size: float) -> str:
    """`3.1 GB`, `640 MB`: powers of ten, as everywhere that sizes are written for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def count(number: float) -> str:
    """`950`, `12,345`, `4.2 M` or `1.3 B`."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,.0f}"


def rate(tokens_per_second: float | None) -> str:
    """`532 tok/s`, `8.4 tok/s`; `-` where it is not known."""
    if tokens_per_second is None:
        return "- tok/s"
    return f"{tokens_per_second:,.0f} tok/s" if tokens_per_second >= 10 else f"{tokens_per_second:.1f} tok/s"


def loss(value: float | None) -> str:
    """Four digits after the point for what is below 10; scientific below 0.001; `-` where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def learning_rate(value: float | None) -> str:
    """`2.0e-04`; `-` where there is none."""
    return "-" if value is None else f"{value:.1e}"


def accuracy(metrics: Mapping[str, float]) -> str:
    """`, 87 % of pairs right` or `, reward 0.5`, where an objective says so; else nothing."""
    share, reward = metrics.get("rewards/accuracies"), metrics.get("reward")
    if reward is not None:
        return f", reward {reward:.4g}"
    return "" if share is None else f", {100 * share:.0f} % of pairs right"


def score(metric: str, value: float) -> str:
    """`exact match 66.7 %`, of generated answers."""
    return f"{metric.replace('_', ' ')} {value:.1f} %"


def best(evaluation: Mapping[str, Any]) -> str:
    """The `best_eval` of a summary, by what decided."""
    return score(evaluation["metric"], evaluation["score"]) if "score" in evaluation else loss(evaluation["loss"])


def program() -> str:
    """How this program is called from where the person is: `lowrank`, or the path that was typed."""
    typed = sys.argv[0]
    if shutil.which("lowrank"):
        return "lowrank"
    return typed if os.path.basename(typed) == "lowrank" else f"{os.path.basename(sys.executable)} -m lowrank"
