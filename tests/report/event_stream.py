"""A run as its listeners see it, without a model: the events that the loop emits, in its order."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lowrank.report.events import EvalDone, Event, JobFinished, JobStarted, Notice, Reporter, RunStarted, StepDone
from lowrank.report.progress import RunProgress

TWO = {"a": 20, "b": 12}


def loss_of(job: str, step: int) -> float:
    """The same at every call, so that a resumed stream goes on like the first."""
    return 1.0 + math.exp(-step / 10) + random.Random(f"{job} {step}").gauss(0, 0.05)


def run_events(
    jobs: Mapping[str, int],
    output_dir: Path = Path("runs/first"),
    *,
    first: int = 0,
    until: int | None = None,
    seconds: float = 2.0,
    log_every: int = 5,
    eval_every: int = 4,
    not_finite: tuple[tuple[str, int], ...] = (),
) -> Iterator[Event]:
    """Every job (name: steps) from step `first` on, in turns; the run breaks off after step `until`, unless None."""
    started = [JobStarted(name, steps, min(first, steps), 3.0, 1000, f"{name}'s") for name, steps in jobs.items()]
    config = {"jobs": [{"name": name, "objective": "sft", "data": {"eval": ["held-out.json"]}} for name in jobs]}
    yield Notice("2 rows dropped", "warning", next(iter(jobs)))
    yield RunStarted(output_dir, tuple(started), config, "cpu", "float32")
    for step in range(first + 1, (until or max(jobs.values())) + 1):
        active = [name for name, steps in jobs.items() if step <= steps]
        for name in active:
            bad = (name, step) in not_finite
            yield StepDone(
                job=name,
                step=step,
                epoch=3 * step / jobs[name],
                loss=math.nan if bad else loss_of(name, step),
                grad_norm=math.inf if bad else 1.0,
                learning_rate=1e-4,
                tokens=100,
                loss_tokens=60.0,
                seconds=seconds,
                skipped=bad,
                metrics={"rewards/margin.mean": -math.inf if bad else 0.5},
                logged=step == 1 or step % log_every == 0 or step == jobs[name],
            )
            if bad:
                yield Notice(f"step {step} of {name} was skipped", "warning", name)
        for name in active:
            if step % eval_every == 0 or step == jobs[name]:
                yield EvalDone(name, step, loss_of(name, step) + 0.1, 50.0, best=step == eval_every)
        for name in active:
            if step == jobs[name]:
                yield JobFinished(name, step, "done")


def report_all(events: Iterable[Event], *reporters: Reporter) -> None:
    for event in events:
        for reporter in reporters:
            reporter.report(event)
    for reporter in reporters:
        reporter.close()


class Clock:
    """Ticks by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def timed(events: Iterable[Event], clock: Clock, *, between: float = 0.0) -> Iterator[Event]:
    """The clock moves by a step's seconds when the first job reports it, and `between` on every evaluation."""
    reported: set[str] = set()
    for event in events:
        if isinstance(event, StepDone):
            if not reported or event.job in reported:
                reported = set()
                clock.now += event.seconds
            reported.add(event.job)
        elif type(event).__name__ == "EvalDone":
            clock.now += between
        yield event


def progress_after(events: Iterable[Event], clock: Clock, **how: float) -> RunProgress:
    progress = RunProgress()
    for event in timed(events, clock, **how):
        progress.consume(event, clock.now)
    return progress
