"""A sweep in a run: its candidates in the queue, and what it leaves in the run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowrank.checkpoints.atomic import new_folder
from lowrank.config import RunConfig
from lowrank.config.checks import sweep_metric
from lowrank.pipelines.job_queue import JobQueue
from lowrank.pipelines.job_setup import num_steps_of
from lowrank.pipelines.queued_job import QueuedJob
from lowrank.report.events import Event, Notice
from lowrank.search.candidates import candidates_among
from lowrank.search.ranking import write_table
from lowrank.search.sampler import require_optuna, write_database
from lowrank.search.sweep import Sweep

BEST = "best"
"""The winner's best adapter, in the run folder."""


def check_sweep(config: RunConfig) -> None:
    """Check that the libraries of a sweep are installed. ConfigError if not."""
    if config.sweep is not None and "optuna" in (config.sweep.sampler, config.sweep.storage):
        require_optuna()


def add_search(queue: JobQueue, config: RunConfig, live: Mapping[str, Any] | None) -> Sweep | None:
    """Make the sweep of the settings the search of `queue`. `live`: `JobQueue.state` of the checkpoint, if there is
    one. Returns None without a sweep."""
    if config.sweep is None:
        return None
    candidates = candidates_among(config.sweep, {job.name for job in config.jobs})
    sweep = Sweep(
        config.sweep, candidates, sweep_metric(config), max(map(_warmup, queue.entries.values()), default=0.0)
    )
    if live is not None and live["search"] is not None:
        sweep.load_state(live["search"])
    queue.search = sweep
    return sweep


def _warmup(entry: QueuedJob) -> float:
    """Return the fraction of a job's steps that are warmup."""
    number = num_steps_of(entry.config, entry.data)
    return entry.config.schedule.warmup(number) / max(1, number)


def record_sweep(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Write the results so far: sweep.json, and the Optuna database if it is set. Returns the table."""
    table = write_table(sweep, folder)
    if "optuna" in (sweep.settings.sampler, sweep.settings.storage):
        write_database(sweep.settings, folder, list(sweep.trials.values()))
    return table


def finish_sweep(sweep: Sweep, folder: Path, report: Callable[[Event], None]) -> str | None:
    """Write the final table and the winner's adapter as `best`; return the winner's name, None if nothing was
    evaluated."""
    table = record_sweep(sweep, folder)
    winner: str | None = table["best"]
    if winner is None:
        report(Notice("sweep: no candidate has a held-out result, so none is the best", level="warning"))
        return None
    source = folder / winner / "best"
    if source.is_dir():
        with new_folder(folder / BEST) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
    tied = [row["name"] for row in table["candidates"] if row["tied"] and row["state"] != "pruned"]
    close = f"; tied with it on these rows, within the error of measurement: {', '.join(tied)}" if tied else ""
    saved = 1.0 - table["steps"] / max(1, table["steps_of_all"])
    report(Notice(f"sweep: the best is {winner} ({folder / BEST}); {saved:.0%} of all steps were not needed{close}"))
    return winner
