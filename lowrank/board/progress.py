"""How far a command is, from the lines it prints with --json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.board.last_line import BAR, last_lines, message_lines
from lowrank.board.tasks import ERRORS, OUTPUT
from lowrank.foreign_files import find_object

_LOOKED_AT = 40


def progress_of(folder: Path) -> dict[str, Any]:
    """What a task says of itself: `label`, `step`, `tokens_per_second`, `seconds_left`, and `done`, a share of 1."""
    found: dict[str, Any] = {"done": None, "label": "", "tokens_per_second": None, "seconds_left": None, "step": None}
    for line in reversed(last_lines(folder / OUTPUT, _LOOKED_AT)):
        entry = find_object(line)
        if entry is None:
            continue
        kind = entry.get("event")
        for key in ("tokens_per_second", "seconds_left", "step"):
            if found[key] is None and isinstance(entry.get(key), (int, float)):
                found[key] = entry[key]
        if not found["label"] and kind in ("notice", "preparing", "progress"):
            found["label"] = str(entry.get("text") or entry.get("what") or "")[:300]
        share = entry.get("done") if isinstance(entry.get("done"), float) else None
        if found["done"] is None and share is not None:
            found["done"] = share
    lines = message_lines(folder / ERRORS, 1)
    bar = BAR.fullmatch(lines[0]) if lines else None
    if bar is not None:
        share = int(bar["done"]) / max(1, int(bar["all"])) if bar["all"] else int(bar["percent"]) / 100
        found |= {"done": share, "label": bar["label"][:300], "seconds_left": _seconds(bar["left"])}
    elif lines and not found["label"]:
        found["label"] = lines[0][:300]
    return found


def _seconds(clock: str) -> float | None:
    """`1:02:03` in seconds; None for `-:--:--`."""
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts):
        return None
    return float(sum(int(part) * 60**place for place, part in enumerate(reversed(parts))))
