"""Run folders as they lie there, whoever started them, in a terminal or here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.board.places import OutsideError, Places
from lowrank.checkpoints.run_folder import CONFIG, MARKER, METRICS, writer_in
from lowrank.foreign_files import find_json

RUNNING, DONE, STOPPED, BROKEN = "running", "done", "stopped", "died"
_UNINFORMATIVE = ("output_dir", "name", "chat_template_date")
"""Settings in which any two runs differ."""


@dataclass(frozen=True)
class RunEntry:
    """One run folder."""

    name: str
    folder: Path
    state: str
    changed: float
    config: dict[str, Any] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    jobs: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The base model as the settings name it."""
        model = self.config.get("model")
        return str(model.get("path", "")) if isinstance(model, dict) else str(model or "")

    @property
    def best_loss(self) -> float | None:
        """The lowest held-out loss of its jobs, or else the last training loss."""
        jobs = [job for job in (self.summary.get("jobs") or {}).values() if isinstance(job, dict)]
        held = [job["best_eval"]["loss"] for job in jobs if (job.get("best_eval") or {}).get("loss") is not None]
        last = [job["last_loss"] for job in jobs if job.get("last_loss") is not None]
        return min(held or last, default=None)


def all_runs(places: Places) -> list[RunEntry]:
    """Every run below `runs`, the latest first."""
    found = []
    with os.scandir(places.runs) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    for name in names:
        try:
            folder = places.run(name)
        except OutsideError:
            continue
        if (folder / MARKER).is_file():
            found.append(read_run(name, folder))
    return sorted(found, key=lambda run: -run.changed)


def read_run(name: str, folder: Path) -> RunEntry:
    """A run folder's state, settings and summary; what is missing or unreadable is empty."""
    marker, config, summary = (read_json(folder / file) for file in (MARKER, CONFIG, "summary.json"))
    changed = max((_time(folder / file) for file in (MARKER, METRICS, "summary.json")), default=0.0)
    jobs = tuple(str(job) for job in (summary.get("jobs") or marker.get("owned") or ()))
    return RunEntry(name, folder, _state(folder, marker, summary), changed, config, summary, jobs)


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints of a run, the latest first."""
    return sorted((path.name for path in _folders(folder / "checkpoints")), reverse=True)


def differing(configs: dict[str, dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The settings in which runs differ, flat: `[("adapter.rank", [8, 16]), ...]`."""
    flat = {name: flattened_through_lists(_without_repetition(config)) for name, config in configs.items()}
    keys = dict.fromkeys(key for one in flat.values() for key in one if key.rpartition(".")[2] not in _UNINFORMATIVE)
    rows = [(key, [one.get(key) for one in flat.values()]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _without_repetition(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose entries of `jobs` have only what differs from the top."""
    jobs = config.get("jobs")
    if not isinstance(jobs, list):
        return config
    top = flattened_through_lists({key: value for key, value in config.items() if key != "jobs"})
    own = []
    for job in jobs:
        flat = flattened_through_lists(job) if isinstance(job, dict) else {}
        own.append({key: value for key, value in flat.items() if key == "name" or top.get(key) != value})
    return {**config, "jobs": own}


def flattened_through_lists(value: Any, above: str = "") -> dict[str, Any]:
    """`{"adapter": {"rank": 8}}` as `{"adapter.rank": 8}`; lists of groups too, by the groups' names or numbers, other
    lists whole (`checkpoints.settings_changes.flattened` leaves all lists whole)."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(item.get("name", n) if isinstance(item, dict) else n, item) for n, item in enumerate(value)]
    else:
        return {above: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flattened_through_lists(item, f"{above}.{key}" if above else str(key))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    return find_json(path) or {}


def _state(folder: Path, marker: dict[str, Any], summary: dict[str, Any]) -> str:
    writer = writer_in(marker)
    if summary and _time(folder / "summary.json") >= writer.started:  # else it is of an earlier start
        return STOPPED if summary.get("interrupted") else DONE
    if writer.lives:
        return RUNNING
    if summary and _time(folder / METRICS) < writer.started:  # ended before its first step: all is as it was
        return STOPPED if summary.get("interrupted") else DONE
    return BROKEN


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
