"""The jobs of a run that goes on: those it began with, with what commands and searches have changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.config import JobConfig, RunConfig

LIVE = "live"
"""Where a checkpoint's run state has what `JobQueue.state` gave."""


def live_state(state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of a checkpoint's run state; None where no checkpoint is, or nothing of it."""
    return None if state is None else state.get(LIVE)


def commands_in(live: Mapping[str, Any] | None) -> Sequence[int]:
    """Numbers of the commands that are in a checkpoint, which runs before 2026-12 called orders."""
    return () if live is None else live["commands"] if "commands" in live else live["orders"]


def as_begun(config: RunConfig, state: Mapping[str, Any]) -> RunConfig:
    """The settings without what commands have made of them, to be compared with those in the checkpoint (`state`).

    The config.json of a run has the jobs that were added and changed, the file that a person keeps has not; both may
    be given where the run goes on.
    """
    live = live_state(state)
    if live is None:
        return config
    first = {job["name"]: job for job in state["settings"]["jobs"]}
    jobs = []
    for job in config.jobs:
        kept = live["jobs"].get(job.name, {})
        if kept.get("added"):
            continue
        if kept.get("settings") and job.model_dump(mode="json") == kept["settings"]:
            job = JobConfig.model_validate(first[job.name])
        jobs.append(job)
    return config.model_copy(update={"jobs": tuple(jobs)})


def in_effect(config: RunConfig, begun: RunConfig, state: Mapping[str, Any] | None) -> RunConfig:
    """The run's settings with the jobs that it has now. `config`: as they were given, `begun`: what `as_begun` made of
    them; of what was given, what differs from the run's beginning holds."""
    live = live_state(state)
    if live is None or state is None:
        return begun
    first = {job["name"]: job for job in state["settings"]["jobs"]}
    given = {job.name: job for job in config.jobs} | {job.name: job for job in begun.jobs}
    jobs = []
    for name, kept in live["jobs"].items():
        now = kept["settings"]
        if now is None:
            jobs.append(given[name])
            continue
        if name in given:
            now = _with_changes(now, first.get(name, now), given[name].model_dump(mode="json"))
        jobs.append(JobConfig.model_validate(now))
    return begun.model_copy(update={"jobs": tuple(jobs)})


def _with_changes(now: Any, before: Any, given: Any) -> Any:
    """`now` with those values of `given` that differ from `before`."""
    if isinstance(now, Mapping) and isinstance(given, Mapping) and isinstance(before, Mapping):
        keys = {**now, **given}
        return {key: _with_changes(now.get(key), before.get(key), given.get(key)) for key in keys}
    return now if given == before else given
