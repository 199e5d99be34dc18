"""One job while it runs: where its data stands, how far it is, and what decides that it is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from lowrank.evaluate.held_out_answers import HeldOutAnswers
from lowrank.segments import Segment
from lowrank.train.schedule import ScheduleConfig
from lowrank.train.trained_job import Forwarded


class StepSource(Protocol):
    """Where a job's optimizer steps come from (data/batching/dataloader.py)."""

    @property
    def epoch(self) -> float:
        """Passes over the rows so far; a fraction."""
        ...

    def next_step(self) -> list[Segment]:
        """The segments of the next optimizer step, numbered (`Segment.origin`)."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain JSON for `load_state`: where it stands."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with the same steps in the same order."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A source of steps that knows the one after the last that it gave."""

    def following(self) -> Sequence[Segment]:
        """The segments of the step that comes next, not numbered. Nothing moves on."""
        ...


class RolloutSource(Protocol):
    """What a job has whose steps are answers that it gives itself (train/rollouts.py)."""

    metrics: dict[str, float]

    @property
    def reward_slot(self) -> int | None:
        """The slot of the reward model; None where functions alone judge."""
        ...

    def submit(self) -> None:
        """Put the questions of the next step, if it has new ones."""
        ...

    def answer(self) -> None:
        """Have what was put answered and judged. ConfigError if a reward function fails; nothing is lost then."""
        ...

    def evaluate(self) -> Forwarded:
        """The likeliest answers to held-out prompts, judged; the loss is minus their mean reward."""
        ...


@dataclass
class JobProgress:
    """What a checkpoint keeps of a job, besides tensors and the dataloader. All of it is plain JSON."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    finished: str | None = None
    """Why it is over: done, early_stopping, not_finite, stopped (by a command), pruned (by a search). None while it
    runs."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    """At the best step."""
    best_score: float | None = None
    """At the best step, where a metric of generated answers decides."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    last_loss: float | None = None
    """At the last evaluation."""
    last_score: float | None = None
    owes_evaluation: bool = False
    """It was due after the last step, and a file of a held-out row was broken or gone."""
    best_rows: list[list[float]] | None = None
    """At the best step: what each held-out row added to the loss, or each answer to the metric that decides, and how
    much it counted, where a job `compares_rows`."""


@dataclass
class Job:
    """A job as the loop sees it. `slot` is its adapter in the bank (-1: the base's own parameters)."""

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
    """Its dataloader, where it answers its prompts itself. Its losses are then minus the mean reward."""
    eval_at: frozenset[int] = frozenset()
    """Steps after which it is evaluated besides."""
    compares_rows: bool = False
    """Its evaluations keep what each held-out row says (`JobProgress.best_rows`)."""

    @property
    def eval_metric(self) -> str:
        """What decides which of its adapters is the best."""
        return "loss" if self.answers is None else self.answers.metric

    @property
    def active(self) -> bool:
        """It still takes steps."""
        return self.progress.finished is None

    def next_learning_rate(self) -> float:
        """Of the step that is about to be taken."""
        return self.learning_rate * self.schedule.factor(self.progress.step, self.num_steps)

    def count_step(self, skipped: bool, overflowed: bool = False) -> None:
        """One optimizer step more, taken or skipped; the last one, or one skip too many, ends the job.

        `overflowed`: skipped only to find the loss scale, which says nothing against the job.
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
        """This step's loss belongs in the log: the first, the last, and every `log_every`-th."""
        step = self.progress.step
        return step == 1 or step % self.log_every == 0 or not self.active

    def evaluates_now(self) -> bool:
        """Held-out rows are due."""
        due = self.eval_every is not None and self.progress.step % self.eval_every == 0
        due = due or self.progress.step in self.eval_at
        return bool(self.held_out) and (due or self.progress.finished == "done")

    def evaluates_at_the_start(self) -> bool:
        """An evaluation is owed; and a job that answers itself says first what its answers are worth before it has
        learned anything."""
        first = self.rollouts is not None and self.active and self.progress.step == 0
        return bool(self.held_out) and (first or self.progress.owes_evaluation)

    def count_evaluation(self, loss: float, score: float | None = None) -> bool:
        """Take note of an evaluation; True if it is the best so far: the lowest loss, or, where answers are generated,
        the highest score, and of equal scores the one with the lower loss."""
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
