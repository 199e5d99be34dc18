"""The loop: every tick, one optimiser step of every active job; now and then evaluate, save, report.

Jobs of different length finish on their own; a finished job's slot costs nothing any more. The loop
knows data as steps of segments, the disk as a `Keeper`, and people as a function that takes events.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from lowrank.errors import LowrankError
from lowrank.evaluate.held_out_answers import score_answers
from lowrank.kernels.host_memory import Heap
from lowrank.train.engine import Engine, Forwarded, Updated
from lowrank.train.events import CheckpointSaved, EvalDone, Event, JobFinished, Notice, StepDone
from lowrank.train.job import Job, SelfAnswering
from lowrank.train.optimizers import bytes_of_state


class Keeper(Protocol):
    """Who writes to the run folder (train/keeper.py)."""

    def keep(self, job: Job, which: str) -> Path:
        """Write a job's adapter as `best` or `last`."""
        ...

    def checkpoint(self, tick: int, jobs: Sequence[Job]) -> Path:
        """Write the state of all jobs, from which `resume` goes on bit by bit."""
        ...


class Loop:
    """Runs jobs to their ends. `tick` counts the rounds; job.progress.step counts a job's own steps."""

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        keeper: Keeper,
        report: Callable[[Event], None],
        *,
        save_every: int | None,
        tick: int = 0,
    ) -> None:
        self.engine = engine
        self.jobs = tuple(jobs)
        self.keeper = keeper
        self._report = report
        self._telling = False
        self._to_tell: list[Event] = []
        self.save_every = save_every
        self.tick = tick
        self.stop_asked = False
        self._heap = Heap()

    def run(self) -> bool:
        """Until every job is over, or a person asked to stop; True if all are over. The last state is saved."""
        with self._stop_on_interrupt():
            self._evaluate([job for job in self.jobs if job.evaluates_at_the_start()])
            while not self.stop_asked and (active := [job for job in self.jobs if job.active]):
                self._answer([job.rollouts for job in active if job.rollouts is not None])
                self._step(active)
                self._evaluate([job for job in active if job.evaluates_now()])
                self._finish([job for job in active if not job.active])
                if self.save_every and self.tick % self.save_every == 0 and any(job.active for job in active):
                    self._save()
            done = not any(job.active for job in self.jobs)
            if not done:
                for job in self.jobs:
                    if job.active:
                        kept = bytes_of_state(self.engine.jobs[job.slot].optimizer)
                        self._tell(JobFinished(job.name, job.progress.step, "interrupted", kept))
            self._save()
        return done

    def _tell(self, event: Event) -> None:
        self._telling = True
        try:
            self._report(event)
        finally:
            self._telling = False
        while self._to_tell:
            self._tell(self._to_tell.pop(0))

    def _answer(self, answering: list[SelfAnswering]) -> None:
        """First all are asked, so that they are answered together. A judge that fails costs no step that was taken."""
        try:
            for rollouts in answering:
                rollouts.ask()
            for rollouts in answering:
                rollouts.answer()
        except LowrankError:
            self._save()
            raise

    def _step(self, active: list[Job]) -> None:
        started = time.perf_counter()
        rates = {job.slot: job.next_learning_rate() for job in active}
        forwarded = self.engine.forward_backward({job.slot: job.feed.next_step() for job in active}, rates)
        updated = {job.slot: self.engine.optim_step(job.slot, rates[job.slot]) for job in active}
        self.tick += 1
        self._heap.after_step()
        seconds = time.perf_counter() - started
        for job in active:
            job.count_step(updated[job.slot].skipped, overflowed=updated[job.slot].loss_scale is not None)
            self._report_step(job, forwarded[job.slot], updated[job.slot], rates[job.slot], seconds)

    def _report_step(self, job: Job, forwarded: Forwarded, updated: Updated, rate: float, seconds: float) -> None:
        if job.rollouts is not None:
            forwarded = _as_rewarded(forwarded, job.rollouts.metrics)
        self._tell(
            StepDone(
                job=job.name,
                step=job.progress.step,
                epoch=job.feed.epoch,
                loss=forwarded.loss,
                grad_norm=updated.grad_norm,
                learning_rate=rate,
                tokens=forwarded.tokens,
                loss_tokens=forwarded.totals.get("tokens", 0.0),
                seconds=seconds,
                skipped=updated.skipped,
                metrics=forwarded.metrics,
                logged=job.logs_now() or updated.skipped,
            )
        )
        if updated.loss_scale is not None:
            text = (
                f"step {job.progress.step} of {job.name}: float16 gradients overflowed; the step was skipped, and its "
            )
            self._tell(Notice(f"{text}loss scale is {updated.loss_scale:g} from now on", job=job.name))
        elif updated.skipped:
            row = job.progress.skipped_in_a_row
            self._tell(
                Notice(
                    f"step {job.progress.step} of {job.name} gave a loss or gradient that is not finite; the step was "
                    f"skipped ({row} in a row, the job stops after {job.max_skipped_steps + 1})",
                    level="warning",
                    job=job.name,
                )
            )

    def _evaluate(self, due: list[Job]) -> None:
        if not due:
            return
        plain = {job.slot: job.held_out for job in due if job.rollouts is None}
        results = self.engine.evaluate(plain) if plain else {}
        results |= {job.slot: job.rollouts.evaluate() for job in due if job.rollouts is not None}
        asked = {job.slot: job.answers for job in due if job.answers is not None}
        scores = score_answers(self.engine.base, self.engine.bank, asked) if asked else {}
        for job in due:
            result, own = results[job.slot], scores.get(job.slot, {})
            best = job.count_evaluation(result.loss, own.get(job.eval_metric))
            if best:
                self.keeper.keep(job, "best")
            tokens = result.totals.get("tokens", 0.0)
            metrics = {**result.metrics, **own}
            self._tell(EvalDone(job.name, job.progress.step, result.loss, tokens, best, metrics, job.eval_metric))

    def _finish(self, finished: list[Job]) -> None:
        for job in finished:
            self.keeper.keep(job, "last")
            if job.progress.best_step is None:  # nothing was held out: the last is the best there is
                self.keeper.keep(job, "best")
            kept = bytes_of_state(self.engine.jobs[job.slot].optimizer)
            self._tell(JobFinished(job.name, job.progress.step, job.progress.finished or "done", kept))

    def _save(self) -> None:
        self._tell(CheckpointSaved(self.tick, self.keeper.checkpoint(self.tick, self.jobs)))

    @contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        """Ctrl-C lets the running step end and saves; a second one stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            del number, frame
            if self.stop_asked:
                raise KeyboardInterrupt
            self.stop_asked = True
            notice = Notice("stopping after this step and saving; press Ctrl-C again to stop at once", "warning")
            if self._telling:  # a reporter is in the middle of a line
                self._to_tell.append(notice)
            else:
                self._tell(notice)

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not in the main thread: whoever runs us there deals with interrupts
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _as_rewarded(forwarded: Forwarded, metrics: dict[str, float]) -> Forwarded:
    """What is minimised is minus the reward; the loss whose gradient does it is near 0 and says nothing."""
    shown = {**metrics, **forwarded.metrics, "policy_loss": forwarded.loss}
    return replace(forwarded, loss=-metrics["reward"], metrics=shown)
