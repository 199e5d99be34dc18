"""The ranked candidates of a sweep, from sweep.json, which may be of another version or of anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.checkpoints.run_folder import SWEEP_TABLE
from lowrank.foreign_files import find_json
from lowrank.report.sweep_view import Parallel, fields, half_width, parallel, result, short, shown

_SHOWN = 200
"""Candidates in the table, the best of them."""


def sweep_table(folder: Path) -> dict[str, Any] | None:
    """`columns` (the settings in which candidates differ), `rows` (the best first), `parallel` (coordinates to draw,
    or None), and what the search saved; None where the run is no sweep."""
    sweep = find_json(folder / SWEEP_TABLE)
    if not sweep:
        return None
    try:
        names = fields(sweep)
        rows = [_row(row, names, sweep["best"]) for row in sweep["candidates"][:_SHOWN]]
        drawn: Parallel | None = parallel(sweep)
        return {
            "search": sweep["search"],
            "metric": sweep["metric"],
            "best": sweep["best"],
            "columns": [(name, short(name, names)) for name in names],
            "rows": rows,
            "total": len(sweep["candidates"]),
            "tied": sum(row["tied"] for row in rows),
            "saved": 1.0 - sweep["steps"] / max(1, sweep["steps_of_all"]),
            "parallel": drawn,
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def _row(row: dict[str, Any], names: list[str], best: str | None) -> dict[str, Any]:
    difference = row["difference"]
    return {
        "name": str(row["name"]),
        "place": row["place"],
        "values": [shown(row["values"].get(name, "")) for name in names],
        "step": row["step"],
        "steps": row["num_steps"],
        "result": result(row),
        "half_width": half_width(row).removeprefix(" ± "),
        "difference": None if difference is None else f"{difference:+.4f}",
        "tied": bool(row["tied"]),
        "state": str(row["state"]),
        "is_best": row["name"] == best,
    }
