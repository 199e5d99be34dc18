"""Merges the shares of a run into one: summary, curves, the sweep's table, its winner, all adapters."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.checkpoints.adapter_folder import JOB_FOLDERS
from lowrank.checkpoints.atomic import current, new_file, new_folder, write_text
from lowrank.checkpoints.run_folder import CHECKPOINTS, CONFIG, METRICS, open_merged_folder
from lowrank.checkpoints.shared_folder import read_assignment, share_folders
from lowrank.checkpoints.steps import latest_checkpoint, read_top
from lowrank.config import settings_of_run
from lowrank.errors import OutputError
from lowrank.foreign_files import find_json
from lowrank.pipelines.saved_run import LIVE
from lowrank.pipelines.sweeps import finish_sweep
from lowrank.report.event_lines import encode
from lowrank.report.events import Event, Notice
from lowrank.report.page import DATA_REPORT, write_report
from lowrank.report.plots import write_loss_plot
from lowrank.report.reporters.metrics import read_metrics
from lowrank.report.summary import PLOT, SUMMARY, best_job
from lowrank.search.config import SweepConfig
from lowrank.search.sweep import Sweep, Trial, trials_of


@dataclass(frozen=True)
class _Part:
    """One share that has started."""

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    """None until it has ended, in order or interrupted."""


def is_shared(folder: Path) -> bool:
    """Return whether the run in this folder is trained in shares."""
    return bool(share_folders(folder))


def merge_shares(output_dir: Path, notify: Callable[[str], None], *, locked: bool = False) -> dict[str, Any] | None:
    """Write into `output_dir` what an undivided run would have written, from the shares that have ended. Returns the
    contents of summary.json, None if no share has ended. May be called again at any time. `locked`: the caller holds
    the folder's lock. OutputError for a job that is in two shares."""
    names = list(_assigned_names(output_dir))
    parts = [part for folder in share_folders(output_dir) if (part := _read(folder)) is not None]
    whole = [part for part in parts if part.summary is not None]
    if not whole:
        return None
    _refuse_twice(parts)
    hold = nullcontext() if locked else open_merged_folder(output_dir, jobs=names, resume=True)
    with hold:
        config = _config(output_dir, parts, names)
        write_text(output_dir / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        reports: dict[str, Any] = {}
        for part in parts:
            reports |= find_json(part.folder / DATA_REPORT) or {}
        write_text(output_dir / DATA_REPORT, json.dumps(reports, ensure_ascii=False) + "\n")
        lines = _lines(parts)
        with new_file(output_dir / METRICS) as partial:
            partial.write_bytes("".join(encode(line) + "\n" for line in lines).encode())
        for part in parts:
            for job in part.config["jobs"]:
                _take_adapters(part.folder / job["name"], output_dir / job["name"])
        winner = _winner(output_dir, config, parts, names, notify)
        summary = _summary(output_dir, config, whole, names, winner)
        write_text(output_dir / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        try:
            write_loss_plot(lines, output_dir / PLOT, f"{output_dir.name}: loss")
            write_report(output_dir)
        except Exception as error:  # fonts, a full disk: the numbers are written
            notify(f"pictures and pages could not be written ({type(error).__name__}: {error})")
    missing = [name for name in names if name not in summary["jobs"]]
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        notify(f"no result yet of {len(missing)} of {len(names)} jobs: {shown}")
    return summary


def _assigned_names(output_dir: Path) -> dict[str, int]:
    found = read_assignment(output_dir)
    if found is None:
        raise OutputError(
            f"{output_dir}: no shares of a run in it to merge; name the output_dir of a run with devices or share set"
        )
    return found[1]


def _read(folder: Path) -> _Part | None:
    config = find_json(folder / CONFIG)
    if config is None:
        return None
    settings_of_run(folder / CONFIG)  # names of jobs become folders here, so foreign settings must be refused
    return _Part(folder, config, find_json(folder / SUMMARY))


def _refuse_twice(parts: Sequence[_Part]) -> None:
    seen: dict[str, Path] = {}
    for part in parts:
        for job in part.config["jobs"]:
            other = seen.setdefault(job["name"], part.folder)
            if other != part.folder:
                raise OutputError(f"{job['name']} is in two shares, {other} and {part.folder}; delete one of them")


def _config(output_dir: Path, parts: Sequence[_Part], names: Sequence[str]) -> dict[str, Any]:
    """Return the settings of all jobs that have started, in the given order."""
    known = {job["name"]: job for part in parts for job in part.config["jobs"]}
    ordered = [*(name for name in names if name in known), *(name for name in known if name not in names)]
    return {**parts[0].config, "output_dir": str(output_dir), "jobs": [known[name] for name in ordered]}


def _lines(parts: Sequence[_Part]) -> list[dict[str, Any]]:
    """Return all lines of metrics by time; a notice that every share gives about the whole run is there once."""
    lines = [line for part in parts for line in read_metrics(part.folder / METRICS)]
    seen: set[str] = set()
    kept = []
    for line in sorted(lines, key=lambda line: line.get("time", 0.0)):
        if line.get("event") == "notice" and line.get("job") is None:
            if line["text"] in seen:
                continue
            seen.add(line["text"])
        kept.append(line)
    return kept


def _take_adapters(source: Path, target: Path) -> None:
    """Copy `best` and `last` of a job, as hard links where the file system has them: files of adapters never change."""
    for which in JOB_FOLDERS:
        adapter = current(source / which)
        if adapter.is_dir():
            with new_folder(target / which) as partial:
                shutil.copytree(adapter, partial, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _winner(
    output_dir: Path,
    config: Mapping[str, Any],
    parts: Sequence[_Part],
    names: Sequence[str],
    notify: Callable[[str], None],
) -> str | None:
    """Write the table of a sweep and return its best candidate; None where there is no sweep."""
    if not config.get("sweep"):
        return None
    settings = SweepConfig.model_validate(config["sweep"])
    sweep = Sweep(settings, [], settings.metric or config["jobs"][0]["eval_metric"])
    trials: dict[str, Trial] = {}
    for part in parts:
        checkpoint = latest_checkpoint(part.folder / CHECKPOINTS)
        search = read_top(checkpoint)["state"][LIVE]["search"] if checkpoint is not None else None
        trials |= trials_of(search) if search else {}
    sweep.trials = {name: trials[name] for name in names if name in trials}

    def on_event(event: Event) -> None:
        if isinstance(event, Notice) and event.level == "warning":
            notify(event.text)

    return finish_sweep(sweep, output_dir, on_event)


def _summary(
    output_dir: Path, config: Mapping[str, Any], parts: Sequence[_Part], names: Sequence[str], winner: str | None
) -> dict[str, Any]:
    """Return the merged summary. Tokens are summed; seconds and peak memory are the maxima over the shares."""
    found = [part.summary for part in parts if part.summary is not None]
    jobs = {name: job for summary in found for name, job in summary["jobs"].items()}
    ordered = {name: jobs[name] for name in (*names, *jobs) if name in jobs}
    tokens = sum(summary["train_tokens"] for summary in found)
    seconds = max(summary["train_seconds"] for summary in found)
    devices = [summary["peak_device_memory_bytes"] for summary in found]
    shares = [
        {
            "share": part.folder.name,
            "jobs": list(part.summary["jobs"]) if part.summary else [],
            "interrupted": bool(part.summary and part.summary["interrupted"]),
            "train_seconds": part.summary["train_seconds"] if part.summary else None,
            "device": part.summary["device"] if part.summary else None,
        }
        for part in parts
    ]
    return {
        **found[0],
        "output_dir": str(output_dir),
        "interrupted": any(summary["interrupted"] for summary in found) or not {*names} <= {*ordered},
        "best_job": winner or best_job(ordered, dict(config)),
        "train_tokens": tokens,
        "train_seconds": seconds,
        "tokens_per_second": round(tokens / seconds, 2) if seconds > 0 else None,
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in found),
        "peak_device_memory_bytes": max((each for each in devices if each is not None), default=None),
        "jobs": ordered,
        "shares": shares,
    }
