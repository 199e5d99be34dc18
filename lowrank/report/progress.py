"""How far a run is and when it will be over: one state, fed with events, that every view reads."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from lowrank.report.curve import Curve
from lowrank.report.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    JobFinished,
    JobMoved,
    JobStarted,
    RunFinished,
    RunStarted,
    StepDone,
)

RECENT = 32
"""Steps that count for rates: enough to be calm, few enough to follow a change."""
SMOOTHING = 0.9
"""Weight of the past in the displayed loss (an exponential mean without bias at its start)."""


@dataclass
class JobView:
    """One job as a person watches it. Losses are nats per token."""

    started: JobStarted
    step: int
    epoch: float = 0.0
    state: str = "waiting"
    """waiting (for its first step), running, queued (for a slot), paused, or a reason of `JobFinished`."""
    loss: float | None = None
    """Smoothed."""
    last_loss: float | None = None
    learning_rate: float | None = None
    eval_loss: float | None = None
    eval_score: float | None = None
    """Percent, where a metric of generated answers decides."""
    eval_is_best: bool = False
    best_loss: float | None = None
    best_step: int | None = None
    skipped: int = 0
    idle: bool = False
    """It takes no part in the steps of the run, though nobody said why."""
    curve: Curve = field(default_factory=lambda: Curve(limit=64))
    tokens: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    _sum: float = 0.0
    _weight: float = 0.0

    @property
    def name(self) -> str:
        """The job's."""
        return self.started.name

    @property
    def running(self) -> bool:
        """It takes, or is about to take, steps."""
        return self.state in ("waiting", "running") and not self.idle

    @property
    def steps_left(self) -> int:
        """Optimizer steps it will take, unless it ends early; 0 when it is over."""
        return max(0, self.started.num_steps - self.step) if self.running or self.state == "queued" else 0

    def take(self, event: StepDone) -> None:
        """One step more."""
        self.step, self.epoch, self.learning_rate = event.step, event.epoch, event.learning_rate
        self.state, self.idle = "running", False
        self.last_loss = event.loss
        self.skipped += event.skipped
        self.tokens.append(event.tokens)
        self.curve.add(event.step, event.loss)
        if math.isfinite(event.loss):
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * event.loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
            self.loss = self._sum / self._weight


@dataclass
class _Round:
    """One optimizer step of all jobs that still run; they share its wall time."""

    arrived: float
    seconds: float
    tokens: int = 0
    jobs: set[str] = field(default_factory=set)


class RunProgress:
    """Consumes events; answers how fast, how far, how long. Pure: the clock is an argument, in seconds.

    Only what this process did counts for rates, so the time left is right after a resume. The cost of a
    step is taken as its tokens over the recent median rate; jobs of different length end on their own, and
    steps get cheaper as they do. What happens between steps (evaluation, checkpoints) is spread over the steps.
    """

    def __init__(self) -> None:
        self.run: RunStarted | None = None
        self.jobs: dict[str, JobView] = {}
        self.checkpoint_step: int | None = None
        self.finished: RunFinished | None = None
        self.started_at: float | None = None
        self._now = 0.0
        self._rounds: deque[_Round] = deque(maxlen=RECENT)
        self._num_rounds = 0
        self._between = 0.0

    def consume(self, event: Event, now: float) -> None:
        """Take note of an event that came at `now`."""
        self._now = now
        if isinstance(event, RunStarted):
            self._start(event, now)
        elif isinstance(event, StepDone):
            self._join_round(event, now)
            self.jobs[event.job].take(event)
        elif isinstance(event, EvalDone):
            self._evaluated(event)
        elif isinstance(event, JobFinished):
            self.jobs[event.job].state = event.reason
        elif isinstance(event, JobMoved):
            self.jobs[event.job].state = event.state
        elif isinstance(event, JobStarted):
            self._come(event)
        elif isinstance(event, CheckpointSaved):
            self.checkpoint_step = event.step
        elif isinstance(event, RunFinished):
            self.finished = event

    def _start(self, event: RunStarted, now: float) -> None:
        self.run, self.started_at = event, now
        for job in event.jobs:
            self.jobs[job.name] = JobView(job, step=job.first_step, state=_first_state(job))

    def _come(self, event: JobStarted) -> None:
        """A job that was added, or that waited and has a slot now."""
        known = self.jobs.get(event.name)
        if known is None:
            self.jobs[event.name] = JobView(event, step=event.first_step, state=_first_state(event))
        else:
            known.started, known.state, known.idle = event, _first_state(event), False

    def _evaluated(self, event: EvalDone) -> None:
        job = self.jobs[event.job]
        job.eval_loss, job.eval_is_best = event.loss, event.best
        job.eval_score = event.metrics.get(event.metric)
        if event.best:
            job.best_loss, job.best_step = event.loss, event.step

    def _join_round(self, event: StepDone, now: float) -> None:
        last = self._rounds[-1] if self._rounds else None
        if last is None or event.job in last.jobs:
            if last is not None:
                self._between += max(0.0, now - last.arrived - event.seconds)
                for name, job in self.jobs.items():
                    job.idle = name not in last.jobs
            last = _Round(arrived=now, seconds=event.seconds)
            self._rounds.append(last)
            self._num_rounds += 1
        last.jobs.add(event.job)
        last.tokens += event.tokens

    @property
    def round_complete(self) -> bool:
        """Every job that still runs has reported its part of the latest step."""
        return bool(self._rounds) and all(
            job.name in self._rounds[-1].jobs for job in self.jobs.values() if job.running
        )

    @property
    def step(self) -> int:
        """Steps of the job that is furthest."""
        return max((job.step for job in self.jobs.values()), default=0)

    @property
    def num_steps(self) -> int:
        """Steps of the longest job."""
        return max((job.started.num_steps for job in self.jobs.values()), default=0)

    @property
    def tokens_per_second(self) -> float | None:
        """The median over recent steps, all jobs together; None before the first step is whole."""
        whole = list(self._rounds) if self.round_complete else list(self._rounds)[:-1]
        rates = [each.tokens / each.seconds for each in whole if each.seconds > 0 and each.tokens]
        return statistics.median(rates) if rates else None

    def elapsed(self, now: float) -> float:
        """Seconds since this process began to train."""
        return 0.0 if self.started_at is None else now - self.started_at

    def seconds_left(self, now: float, name: str | None = None) -> float | None:
        """Until the run, or one job of it, has taken its last step; None while nothing is known."""
        rate = self.tokens_per_second
        horizon = self._rounds_left()
        if name is not None:
            horizon = self.jobs[name].steps_left
        if horizon == 0:
            return 0.0
        if rate is None:
            return None
        if name is None:
            tokens = sum(job.steps_left * self._tokens_per_step(job) for job in self.jobs.values())
        else:  # with the others that take steps while it does
            others = (job for job in self.jobs.values() if job.running or job.name == name)
            tokens = sum(min(job.steps_left, horizon) * self._tokens_per_step(job) for job in others)
        between = self._between / max(1, self._num_rounds - 1)
        estimate = tokens / rate + between * horizon
        return max(0.0, estimate - min(now - self._now, self._rounds[-1].seconds))

    def _rounds_left(self) -> int:
        """Steps until the last job is over: those that wait come one after another where others end."""
        running = [job.steps_left for job in self.jobs.values() if job.running]
        waiting = sum(job.steps_left for job in self.jobs.values() if job.state == "queued")
        return max(max(running, default=0), math.ceil((sum(running) + waiting) / max(1, len(running))))

    def _tokens_per_step(self, job: JobView) -> float:
        """Of a job that has taken none yet: as the others."""
        if job.tokens:
            return statistics.fmean(job.tokens)
        if job.state != "queued":
            return 0.0
        known = [statistics.fmean(each.tokens) for each in self.jobs.values() if each.tokens]
        return statistics.fmean(known) if known else 0.0


def _first_state(job: JobStarted) -> str:
    over = job.finished or ("done" if job.first_step >= job.num_steps else None)
    return over or ("waiting" if job.state == "running" else job.state)
