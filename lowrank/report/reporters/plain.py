"""Progress as plain lines: for log files, pipes and terminals that cannot move the cursor."""

from __future__ import annotations

import time
from collections.abc import Callable

import rich.console
from rich.markup import escape

from lowrank.report import formatting
from lowrank.report.events import (
    EvalDone,
    Event,
    JobFinished,
    JobStarted,
    Notice,
    Preparing,
    RunFinished,
    RunStarted,
    StepDone,
)
from lowrank.report.process_memory import memory_use
from lowrank.report.progress import JobView, RunProgress
from lowrank.report.summary_view import render_summary

WIDTH = 120
"""Entries of many jobs are wrapped here, whatever the pipe claims its width to be."""


class PlainReporter:
    """A line when every job has taken a logged step, a line for each evaluation, end and notice.

    `quiet` leaves only warnings.
    """

    def __init__(
        self, console: rich.console.Console, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._quiet = quiet
        self._clock = clock
        self._progress = RunProgress()
        self._logged: set[str] = set()

    def report(self, event: Event) -> None:
        """Print a line for each event that a person wants to see; notices alone where it is quiet."""
        now = self._clock()
        self._progress.consume(event, now)
        if isinstance(event, Notice):
            self._notice(event)
        elif self._quiet:
            return
        elif isinstance(event, Preparing):
            self._print(preparing(event))
        elif isinstance(event, RunStarted):
            self._print(title(event))
            for job in event.jobs:
                resumed = f", from step {job.first_step}" if job.first_step else ""
                waits = "" if job.state == "running" else f", {STATES[job.state]}"
                self._print(f"  {job.name}: {job.description}, {job.num_steps} steps{resumed}{waits}")
        elif isinstance(event, JobStarted):
            self._print(f"{self._at(self._progress.step)}  {event.name} begins: {event.description}")
        elif isinstance(event, StepDone):
            self._step(event, now)
        elif isinstance(event, EvalDone):
            best = "  best so far" if event.best else ""
            right = formatting.accuracy(event.metrics)
            if event.metric != "loss":
                right += f", {formatting.score(event.metric, event.metrics[event.metric])}"
            self._print(f"{self._at(event.step)}  {event.job} held-out {formatting.loss(event.loss)}{right}{best}")
        elif isinstance(event, JobFinished):
            self._print(f"{self._at(event.step)}  {event.job} is over: {STATES.get(event.reason, event.reason)}")
        elif isinstance(event, RunFinished):
            self._console.print()
            self._console.print(render_summary(event.summary))

    def _notice(self, event: Notice) -> None:
        if event.level == "warning":
            self._print(f"warning: {about(event)}", style="yellow")
        elif not self._quiet:
            self._print(about(event))

    def _step(self, event: StepDone, now: float) -> None:
        if event.logged:
            self._logged.add(event.job)
        if not (self._logged and self._progress.round_complete):
            return
        progress = self._progress
        memory = memory_use(progress.run.device if progress.run else "cpu")
        used = memory.now if memory.device_now is None else memory.device_now
        head = "  ".join(
            [
                self._at(progress.step),
                formatting.rate(progress.tokens_per_second),
                formatting.gigabytes(used),
                f"{formatting.duration(progress.seconds_left(now))} left",
            ]
        )
        entries = [_entry(progress.jobs[name]) for name in progress.jobs if name in self._logged]
        self._logged.clear()
        if len(progress.jobs) == 1:
            entries = [f"{entries[0].partition(' ')[2]}  lr {formatting.learning_rate(event.learning_rate)}"]
        for line in _wrapped(head, entries):
            self._print(line)

    def _at(self, step: int) -> str:
        total = str(self._progress.num_steps)
        return f"step {step:>{len(total)}}/{total}"

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(escape(text), style=style, soft_wrap=True, highlight=False)

    def close(self) -> None:
        """The console is not ours to close."""


STATES = {
    "waiting": "waiting",
    "running": "running",
    "done": "done",
    "early_stopping": "stopped early",
    "not_finite": "not finite",
    "interrupted": "interrupted",
    "queued": "queued",
    "paused": "paused",
    "stopped": "stopped",
    "pruned": "pruned",
    "failed": "could not begin",
}
"""States of a job and reasons of its end, for people."""


def title(event: RunStarted) -> str:
    """`runs/first · 3 jobs · cpu, float32`."""
    number = len(event.jobs)
    return f"{event.output_dir} · {number} {'job' if number == 1 else 'jobs'} · {event.device}, {event.dtype}"


def preparing(event: Preparing) -> str:
    """`reference log-probabilities: 256 of 4000, 3 min left`."""
    return f"{event.text}: {event.done} of {event.total}, {formatting.duration(event.seconds_left)} left"


def about(notice: Notice) -> str:
    """The notice, with its job in front unless it names it itself."""
    return notice.text if notice.job is None or notice.job in notice.text else f"{notice.job}: {notice.text}"


def _entry(job: JobView) -> str:
    return f"{job.name} loss {formatting.loss(job.last_loss)}"


def _wrapped(head: str, entries: list[str]) -> list[str]:
    lines, current = [], head
    for entry in entries:
        if len(current) + 2 + len(entry) > WIDTH and current.strip():
            lines.append(current)
            current = "    "
        current += f"  {entry}"
    return [*lines, current]
