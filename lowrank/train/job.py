"""A job in the loop: its data, its progress, and when it is evaluated, logged and finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from lowrank.evaluate.held_out_answers import HeldOutAnswers
from lowrank.segments import Segment
from lowrank.train.schedule import ScheduleConfig
from lowrank.train.trained_job import ForwardResult


class StepSource(Protocol):
    """Source of a job's optimizer steps (data/batching/dataloader.py)."""

    @property
    def epoch(self) -> float:
        """Passes over the rows so far, with the running one as a fraction."""
        ...

    def next_step(self) -> list[Segment]:
        """Return the segments of the next optimizer step, numbered (`Segment.origin`)."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the position as plain JSON for `load_state`."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, with the same steps in the same order."""
        ...


@runtime_checkable
class PeekableSteps(Protocol):
    """A source of steps that knows the next one before it is taken."""

    def peek_next_step(self) -> Sequence[Segment]:
        """Return the segments of the next step, not numbered, without taking it."""
        ...


class RolloutSource(Protocol):
    """Source of steps that are rollouts: answers that the job's own adapter generates (train/rollouts.py)."""

    metrics: dict[str, float]

    @property
    def reward_slot(self) -> int | None:
        """The slot of the reward model; None where only reward functions give rewards."""
        ...

    def submit(self) -> None:
        """Submit the prompts of the next step to the generator, if it needs new answers."""
        ...

    def answer(self) -> None:
        """Generate and reward the answers to what was submitted. ConfigError if a reward function fails; then no step
        is lost."""
        ...

    def evaluate(self) -> ForwardResult:
        """Return metrics of greedy answers to held-out prompts; the loss is minus their mean reward."""
        ...


@dataclass
class JobProgress:
    """Progress of a job, which a checkpoint keeps as plain JSON."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    finished: str | None = None
    """Why the job ended: done, early_stopping, not_finite, stopped (by a command), pruned (by a search), failed. None
    while it runs."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    """Held-out loss at the best step."""
    best_score: float | None = None
    """Score at the best step, where a metric of generated answers decides."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    last_loss: float | None = None
    """Held-out loss at the last evaluation."""
    last_score: float | None = None
    owes_evaluation: bool = False
    """Whether an evaluation was due after the last step and failed at a broken or missing file of a held-out row."""
    best_rows: list[list[float]] | None = None
    """Kept where `Job.keep_row_losses` is set: `[values, counts]` of the held-out rows at the best step. A value is
    what a row adds to the loss, or an answer to the deciding metric; a count is its weight there."""


@dataclass
class Job:
    """A job that has a slot, as the loop trains it. `slot`: of its adapter in the bank (-1: the base's own
    parameters)."""

    name: str
    slot: int
    dataloader: StepSource
    held_out: Sequence[Segment]
    schedule: ScheduleConfig
    learning_rate: float
    num_steps: int
    eval_every: int | None
    """Steps between evaluations; None: only at the end."""
    log_every: int
    max_skipped_steps: int
    patience: int | None
    progress: JobProgress = field(default_factory=JobProgress)
    answers: HeldOutAnswers | None = None
    """Held-out questions whose generated answers decide what is best; None: the held-out loss does."""
    rollouts: RolloutSource | None = None
    """The dataloader, where it generates rollouts. The job's losses are then minus the mean reward."""
    eval_at: frozenset[int] = frozenset()
    """Further steps after which the job is evaluated."""
    keep_row_losses: bool = False
    """Whether evaluations keep the losses of single held-out rows (`JobProgress.best_rows`)."""

    @property
    def eval_metric(self) -> str:
        """The metric that decides which of the job's adapters is the best."""
        return "loss" if self.answers is None else self.answers.metric

    @property
    def active(self) -> bool:
        """Whether the job still takes steps."""
        return self.progress.finished is None

    def next_learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return self.learning_rate * self.schedule.factor(self.progress.step, self.num_steps)

    def count_step(self, skipped: bool, overflowed: bool = False) -> None:
        """Count an optimizer step, taken or skipped. The last step, or one skip too many, ends the job.

        `overflowed`: the step was skipped only to adjust the loss scale, which does not count against the job.
        """
        progress = self.progress
        progress.step += 1
        progress.skipped += skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + (not overflowed) if skipped else 0
        if progress.skipped_in_a_row > self.max_skipped_steps:
            progress.finished = "not_finite"
        elif progress.step >= self.num_steps:
            progress.finished = "done"

    def logs_now(self) -> bool:
        """Return whether this step is logged: the first, the last, and every `log_every`-th."""
        step = self.progress.step
        return step == 1 or step % self.log_every == 0 or not self.active

    def evaluates_now(self) -> bool:
        """Return whether an evaluation on held-out rows is due after this step."""
        due = self.eval_every is not None and self.progress.step % self.eval_every == 0
        due = due or self.progress.step in self.eval_at
        return bool(self.held_out) and (due or self.progress.finished == "done")

    def evaluates_at_the_start(self) -> bool:
        """Return whether the job is evaluated before its next step: an evaluation is owed, or a job that trains on
        rollouts has taken no step yet, so that its reward before training is known."""
        first = self.rollouts is not None and self.active and self.progress.step == 0
        return bool(self.held_out) and (first or self.progress.owes_evaluation)

    def count_evaluation(self, loss: float, score: float | None = None) -> bool:
        """Record an evaluation. Returns whether it is the best so far: the lowest loss, or, where answers are
        generated, the highest score, and of equal scores the one with the lower loss."""
        progress = self.progress
        progress.last_loss, progress.last_score, progress.owes_evaluation = loss, score, False
        standing = (score or 0.0, -loss)
        best = progress.best_loss is None or standing > (progress.best_score or 0.0, -progress.best_loss)
        if best and loss == loss and score == score:
            progress.best_loss, progress.best_score, progress.best_step = loss, score, progress.step
            progress.evaluations_without_gain = 0
            return True
        progress.evaluations_without_gain += 1
        if self.active and self.patience is not None and progress.evaluations_without_gain >= self.patience:
            progress.finished = "early_stopping"
        return False
