"""Live commands carried out: what a person or a program wants of a run's jobs while it trains.

They are files in the run's folder (checkpoints/live_commands.py).

Everything about a command is checked before anything of it is done; one that cannot be carried out is refused with the
reason, and the run goes on as if it had never come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from lowrank.checkpoints.live_commands import CommandQueue, LiveCommand
from lowrank.checkpoints.settings_changes import flattened
from lowrank.config import JobConfig, RunConfig, override, validate_settings
from lowrank.config.jobs import complete_jobs
from lowrank.config.schema import JobSettings
from lowrank.data.prepare import Prepared
from lowrank.errors import ConfigError, LowrankError, OutputError, did_you_mean
from lowrank.pipelines.job_queue import JobQueue
from lowrank.pipelines.queued_job import FINISHED, PAUSED, QUEUED, WAITING_FOR_RUNG, QueuedJob
from lowrank.report.events import Event, Notice, RunStarted
from lowrank.report.progress import JobView, RunProgress
from lowrank.report.summary import SummaryBuilder
from lowrank.search.candidates import Candidate
from lowrank.third_party import code_is_allowed

MAY_BE_SET = (
    "optimizer.learning_rate", "optimizer.max_grad_norm", "optimizer.max_skipped_steps", "schedule", "max_steps",
    "num_train_epochs", "early_stopping_patience",
)  # fmt: skip
"""Settings of a job that may change while it trains; all else is another job: `clone`."""
KEPT_BY_A_CLONE = ("adapter", "tuning", "freeze", "data", "objective", "seed", "optimizer.type")
"""What a clone of the present weights has in common with its source."""
STATE_EVERY = 1.0
"""Seconds between two writings of state.json."""


class CommandHandler:
    """Carries the commands of one run out, one after another, between two steps."""

    def __init__(
        self,
        command_queue: CommandQueue,
        queue: JobQueue,
        run: RunConfig,
        *,
        prepare: Callable[[JobConfig], Prepared],
        fits: Callable[[list[QueuedJob]], bool],
        changed: Callable[[], None],
        show: Callable[[], None],
        report: Callable[[Event], None],
        due: Callable[[int], list[LiveCommand]] | None = None,
    ) -> None:
        """`due`: the commands that have come, before a step; left out, those of `command_queue`.
        `fits`: whether these jobs fit into memory together; `changed`: the list of jobs or their settings is
        another; `show`: write down what the jobs do now, so that whoever has a reply sees what came of it."""
        self.command_queue, self._queue, self._run, self._show = command_queue, queue, run, show
        self._due = due or command_queue.due
        self._prepare, self._fits, self._changed, self._report = prepare, fits, changed, report
        self._grows = run.max_concurrent_jobs == "auto" and run.sweep is None

    def carry_out(self, iteration: int) -> None:
        """Carry out all commands that have come, and reply to each."""
        for command in self._due(iteration):
            try:
                text = self._carry_out(command)
                done = True
            except LowrankError as error:
                text, done = str(error), False
            except (KeyError, TypeError, ValueError) as error:  # a file that no writer of ours has written
                text, done = f"this command cannot be understood ({type(error).__name__}: {error})", False
            self._show()
            self.command_queue.acknowledge(command, iteration, text, done=done)
            message = f"command {command.number} ({command.kind}{f' {command.job}' if command.job else ''}): {text}"
            self._report(Notice(message, "info" if done else "warning", job=command.job if done else None))

    def _carry_out(self, command: LiveCommand) -> str:
        carry_out = {
            "add": self._add,
            "clone": self._clone,
            "pause": self._pause,
            "priority": self._priority,
            "resume": self._resume,
            "set": self._set,
            "stop": self._stop,
        }
        return carry_out[command.kind](command)

    def _add(self, command: LiveCommand) -> str:
        (config,) = self._validated([command.values["settings"]])
        return self._join(QueuedJob(config, self._prepare(config), added=True))

    def _clone(self, command: LiveCommand) -> str:
        entry, values = self._entry(command), command.values
        settings = override(entry.config.model_dump(mode="json"), list(values.get("changes", ())))
        settings["name"] = values.get("name") or self._free_name(entry.name)
        (config,) = self._validated([settings])
        if values.get("from_start"):
            return self._join(QueuedJob(config, self._prepare(config), added=True))
        if entry.state == FINISHED or self._queue.progress_of(entry.name).finished:
            raise OutputError(
                f"{entry.name} is over, so its present state is gone; clone it from its start, or add a job with "
                f"adapter.path: {self._run.output_dir / entry.name / 'last'}"
            )
        differing = _differing(entry.config, config, KEPT_BY_A_CLONE)
        if differing:
            raise ConfigError(
                f"a clone of {entry.name}'s present weights cannot change {', '.join(differing)}; clone it from its "
                "start"
            )
        clone, job = QueuedJob(config, self._prepare(config), added=True), self._queue.job(entry.name)
        if job is not None:
            self._queue.checkpointer.copy(job, config.name)
        elif entry.name in self._queue.checkpointer.parked:
            self._queue.checkpointer.copy_parked(entry.name, config.name)
        clone.progress.step = self._queue.progress_of(entry.name).step
        return self._join(clone)

    def make_entry(self, candidate: Candidate) -> QueuedJob:
        """Return a job of what a search proposes, over the run's own settings."""
        top = self._run.model_dump(mode="json", include={*JobSettings.model_fields}, exclude_unset=True)
        (config,) = complete_jobs({**top, "jobs": [candidate.as_entry()]}, tuple(JobSettings.model_fields), "")
        (config,) = self._validated([config])
        return QueuedJob(config, self._prepare(config), added=True)

    def _join(self, entry: QueuedJob) -> str:
        queue = self._queue
        running = [queue.entries[job.name] for job in queue.jobs if job.active]
        if self._grows and len(running) >= queue.capacity and self._fits([*running, entry]):
            queue.capacity = len(running) + 1
        waits = len(running) >= queue.capacity
        queue.add(entry, now=not waits)
        self._changed()
        where = f"waits for a slot: {len(running)} jobs train at the same time" if waits else "trains from now on"
        return f"{entry.name} {where}"

    def _stop(self, command: LiveCommand) -> str:
        entry = self._entry(command)
        self._queue.stop(entry.name, "stopped")
        return f"{entry.name} is over after step {self._queue.progress_of(entry.name).step}"

    def _pause(self, command: LiveCommand) -> str:
        entry = self._entry(command)
        if entry.config.trains_base:
            raise OutputError(f"{entry.name} trains the base itself and has no slot to give away; stop the run instead")
        if entry.state == PAUSED:
            raise OutputError(f"{entry.name} is paused already")
        if entry.state == WAITING_FOR_RUNG:
            raise OutputError(f"{entry.name} takes no steps: the search waits for other candidates")
        self._queue.pause(entry.name)
        return f"{entry.name} is paused after step {entry.progress.step}; its slot is free"

    def _resume(self, command: LiveCommand) -> str:
        entry = self._entry(command)
        if entry.state != PAUSED:
            raise OutputError(f"{entry.name} is not paused")
        self._queue.resume(entry.name)
        return f"{entry.name} goes on from step {entry.progress.step} as soon as there is a slot"

    def _priority(self, command: LiveCommand) -> str:
        entry = self._entry(command)
        entry.priority = int(command.values["priority"])
        return f"{entry.name} has priority {entry.priority}"

    def _set(self, command: LiveCommand) -> str:
        entry, overrides = self._entry(command), list(command.values["changes"])
        settings = override(entry.config.model_dump(mode="json"), overrides)
        (config,) = self._validated([settings], instead_of=entry.name)
        refused = _others(entry.config, config, MAY_BE_SET)
        if refused:
            raise ConfigError(
                f"{', '.join(refused)} cannot change while {entry.name} trains (settings that can change during "
                f"training: {', '.join(MAY_BE_SET)}); clone it with another value"
            )
        self._check_change(entry, config)
        self._queue.change(entry.name, config)
        self._changed()
        return f"{entry.name} has {', '.join(overrides)} from step {self._queue.progress_of(entry.name).step + 1} on"

    def _check_change(self, entry: QueuedJob, config: JobConfig) -> None:
        from lowrank.pipelines.job_setup import num_steps_of

        step = self._queue.progress_of(entry.name).step
        if num_steps_of(config, entry.data) <= step:
            raise ConfigError(f"{entry.name} has taken {step} steps already; stop it, or give it more than those")
        job = self._queue.job(entry.name)
        if job is not None and job.slot >= 0:
            bank = self._queue.allocator.engine.bank
            rates = (entry.config.optimizer.learning_rate, config.optimizer.learning_rate)
            if bank.learning_rate_factors(job.slot, rates[0]) != bank.learning_rate_factors(job.slot, rates[1]):
                raise ConfigError(
                    f"optimizer.learning_rate: {entry.name} has adapter.loraplus_lr_embedding beside it, which is "
                    "bound to the rate it began with; clone it"
                )

    def _entry(self, command: LiveCommand) -> QueuedJob:
        """The job that a command names. OutputError if there is none, or it is over."""
        entries = self._queue.entries
        entry = entries.get(command.job or "")
        if entry is None:
            raise OutputError(f"there is no job {command.job!r} in this run{did_you_mean(str(command.job), entries)}")
        finished = self._queue.progress_of(entry.name).finished
        if finished and command.kind != "clone":
            raise OutputError(f"{entry.name} is over ({finished.replace('_', ' ')}); clone it, or add another job")
        return entry

    def _free_name(self, name: str) -> str:
        return next(f"{name}-{number}" for number in range(2, 10_000) if f"{name}-{number}" not in self._queue.entries)

    def _validated(self, jobs: list[Mapping[str, Any]], instead_of: str | None = None) -> list[JobConfig]:
        """The jobs' settings, checked beside all others of the run."""
        others = [
            entry.config.model_dump(mode="json") for entry in self._queue.entries.values() if entry.name != instead_of
        ]
        settings = self._run.model_dump(mode="json", exclude={"jobs", "sweep"})
        checked = validate_settings(
            {**settings, "jobs": [*others, *jobs]}, source="the command", allow_code=code_is_allowed()
        )
        return list(checked.jobs[len(others) :])


def _differing(one: JobConfig, other: JobConfig, names: tuple[str, ...]) -> list[str]:
    """Those of `names` in which two jobs differ."""
    changed = _changed(one, other)
    return [name for name in names if any(_is_in(key, name) for key in changed)]


def _others(one: JobConfig, other: JobConfig, names: tuple[str, ...]) -> list[str]:
    """Settings in which two jobs differ and that are not of `names`."""
    return [key for key in _changed(one, other) if not any(_is_in(key, name) for name in names)]


def _changed(one: JobConfig, other: JobConfig) -> list[str]:
    """Settings in which two jobs differ, by their dotted names."""
    before, after = flattened(one.model_dump(mode="json")), flattened(other.model_dump(mode="json"))
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def _is_in(key: str, name: str) -> bool:
    """Whether `key` is the setting or group `name`, or of that group."""
    return key == name or key.startswith(f"{name}.")


class StateFile:
    """A reporter that keeps commands/state.json up to date: what each job does, how far it is, how long it takes."""

    def __init__(self, command_queue: CommandQueue, queue: JobQueue, summary: SummaryBuilder) -> None:
        """`summary` receives each event before this does."""
        self._command_queue, self._queue, self._summary = command_queue, queue, summary
        self._verdicts: dict[str, tuple[int, str, dict[str, Any]]] = {}
        self._progress = RunProgress()
        self._written = 0.0
        self._ended = False

    def report(self, event: Event) -> None:
        """Note the event; write the file if the last one is older than STATE_EVERY seconds."""
        now = time.monotonic()
        self._progress.consume(event, now)
        if self._progress.run is not None and (now - self._written >= STATE_EVERY or isinstance(event, RunStarted)):
            self.write()

    def write(self) -> None:
        """Now."""
        now = self._written = time.monotonic()
        progress = self._progress
        jobs = [self._job(view, now) for view in progress.jobs.values()]
        self._command_queue.write_state(
            {
                "time": round(time.time(), 3),
                "ended": self._ended,
                "tokens_per_second": progress.tokens_per_second,
                "seconds_left": progress.seconds_left(now),
                "memory": self._summary.memory(),
                "jobs": jobs,
            }
        )

    def _job(self, view: JobView, now: float) -> dict[str, Any]:
        entry = self._queue.entries[view.name]
        held = entry.state == WAITING_FOR_RUNG and view.state == QUEUED
        return {
            "name": view.name,
            "state": WAITING_FOR_RUNG if held else view.state,
            "step": view.step,
            "num_steps": view.started.num_steps,
            "loss": _finite(view.loss),
            "held_out_loss": _finite(view.eval_loss),
            "best_loss": _finite(view.best_loss),
            "learning_rate": view.learning_rate,
            "priority": entry.priority,
            "seconds_left": progress_left(self._progress, view, now),
            "description": view.started.description,
            "verdict": self._verdict(view),
        }

    def _verdict(self, view: JobView) -> dict[str, Any]:
        """Computed again after 2 % more steps: it takes a millisecond, and there may be a hundred jobs."""
        step, state, verdict = self._verdicts.get(view.name, (-1, "", {}))
        if view.step > 1.02 * step or view.state != state:
            verdict = asdict(self._summary.curve_verdict(view.name))
            self._verdicts[view.name] = (view.step, view.state, verdict)
        return verdict

    def close(self) -> None:
        """Say that the run takes no more commands."""
        self._ended = True
        self.write()


def progress_left(progress: RunProgress, view: JobView, now: float) -> float | None:
    """Seconds until a job that takes steps is over; None where nobody can say."""
    return progress.seconds_left(now, view.name) if view.running else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None
