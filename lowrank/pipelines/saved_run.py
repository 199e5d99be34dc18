"""What a run is resumed from, and the settings that result: the run's jobs with what live commands and searches have
changed since it began.

    requested settings    as given to this process: a person's file, or config.json of the run
    initial settings      the same without what commands have changed; must equal those that the run began with
    effective settings    the jobs that the run has now, with what the requested settings change
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.checkpoints.run_state import RunCheckpoint
from lowrank.config import JobConfig, RunConfig

LIVE = "live"
"""The key under which a checkpoint's run state has what `JobQueue.state` returned."""


@dataclass(frozen=True)
class SavedRun:
    """The checkpoint that a run is resumed from. `checkpoint`: None for a new run, of which all else is None or empty,
    too."""

    checkpoint: RunCheckpoint | None

    @property
    def state(self) -> Mapping[str, Any]:
        """The run's state in the checkpoint, plain JSON (`ActiveRun.state`)."""
        return {} if self.checkpoint is None else self.checkpoint.state

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings that the run began with."""
        return self.state.get("settings")

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `SummaryBuilder.state` returned."""
        return self.state.get("summary")

    @property
    def live(self) -> dict[str, Any] | None:
        """What `JobQueue.state` returned."""
        return self.state.get(LIVE)

    def job_settings(self, name: str) -> Mapping[str, Any]:
        """The settings that a job had when the checkpoint was written, as plain JSON; empty for an unknown job."""
        live = (self.live or {}).get("jobs", {}).get(name, {}).get("settings")
        began = {job["name"]: job for job in (self.settings or {}).get("jobs", ())}
        return live or began.get(name) or {}

    @property
    def capacity(self) -> int | None:
        """How many jobs took steps at the same time."""
        return None if self.live is None else self.live["capacity"]

    @property
    def commands(self) -> Sequence[int]:
        """Numbers of the live commands that were carried out. Runs before 2026-12 called them orders."""
        live = self.live
        return () if live is None else live["commands"] if "commands" in live else live["orders"]


def without_live_changes(requested: RunConfig, saved: SavedRun) -> RunConfig:
    """Return the initial settings: `requested` without what live commands have made of them, to be compared with those
    in the checkpoint.

    The config.json of a run has the jobs that were added and changed, the file that a person keeps does not; a run may
    be resumed with either."""
    live = saved.live
    if live is None or saved.settings is None:
        return requested
    first = {job["name"]: job for job in saved.settings["jobs"]}
    jobs = []
    for job in requested.jobs:
        kept = live["jobs"].get(job.name, {})
        if kept.get("added"):
            continue
        if kept.get("settings"):  # in config.json, what a command has set; beside it whatever a person changes now
            initial = _with_changes(first[job.name], kept["settings"], job.model_dump(mode="json"))
            job = JobConfig.model_validate(initial)
        jobs.append(job)
    return requested.model_copy(update={"jobs": tuple(jobs)})


def with_live_changes(requested: RunConfig, initial: RunConfig, saved: SavedRun) -> RunConfig:
    """Return the effective settings: `initial` with the jobs that the run has now. Where `requested` differs from the
    settings that the run began with, it holds."""
    live = saved.live
    if live is None or saved.settings is None:
        return initial
    first = {job["name"]: job for job in saved.settings["jobs"]}
    given = {job.name: job for job in requested.jobs} | {job.name: job for job in initial.jobs}
    jobs = []
    for name, kept in live["jobs"].items():
        now = kept["settings"]
        if now is None:
            jobs.append(given[name])
            continue
        if name in given:
            now = _with_changes(now, first.get(name, now), given[name].model_dump(mode="json"))
        jobs.append(JobConfig.model_validate(now))
    return initial.model_copy(update={"jobs": tuple(jobs)})


def _with_changes(now: Any, before: Any, given: Any) -> Any:
    """Return `now` with those values of `given` that differ from `before`."""
    if isinstance(now, Mapping) and isinstance(given, Mapping) and isinstance(before, Mapping):
        keys = {**now, **given}
        return {key: _with_changes(now.get(key), before.get(key), given.get(key)) for key in keys}
    return now if given == before else given
