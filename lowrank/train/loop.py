"""The loop: every iteration takes one optimizer step of every active job, then evaluates, saves and reports.

Jobs of different length finish at different iterations; a finished job's slot costs nothing any more. The loop sees
data as steps of segments, the disk as a `CheckpointWriter`, and the user as a function that takes events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

from lowrank.errors import DataError, LowrankError
from lowrank.evaluate.held_out_answers import HeldOutAnswers, Scored, score_answers
from lowrank.kernels.glibc_malloc import Heap
from lowrank.media.medium_files import BadMedium
from lowrank.ranks import agree
from lowrank.report.events import CheckpointSaved, EvalDone, Event, JobFinished, Notice, StepDone
from lowrank.report.summary import note_on_best
from lowrank.segments import Segment
from lowrank.train.engine import Engine
from lowrank.train.job import Job, PeekableSteps, RolloutSource, StepSource
from lowrank.train.optimizers import bytes_of_state
from lowrank.train.step_snapshot import bad_media_error, snapshot, stream_error
from lowrank.train.stop_signal import StopSignal
from lowrank.train.trained_job import ForwardResult, UpdateResult


class CheckpointWriter(Protocol):
    """Writes to the run folder (train/checkpointer.py)."""

    def save_adapter(self, job: Job, which: str) -> Path:
        """Write a job's adapter as `best` or `last`."""
        ...

    def checkpoint(self, iteration: int, jobs: Sequence[Job]) -> Path:
        """Write the state of all jobs, from which a resumed run continues to the bit."""
        ...


class JobScheduler(Protocol):
    """Gives jobs their slots and takes them back (pipelines/job_queue.py)."""

    jobs: list[Job]
    """The jobs that have a slot."""

    def between_steps(self, iteration: int) -> Sequence[Job]:
        """Called before step `iteration + 1`. May change `jobs`; returns those that were given a slot."""
        ...

    def on_evaluated(self, evaluated: Sequence[Job]) -> None:
        """Called when jobs were evaluated on their held-out rows; some of them may have ended afterwards."""
        ...

    def has_pending(self) -> bool:
        """Return whether a job without a slot may be given one later."""
        ...

    def unfinished(self) -> Sequence[tuple[str, int]]:
        """Return name and step of each job without a slot that has not ended."""
        ...


class FixedJobs:
    """A scheduler of jobs that have their slots from beginning to end."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)

    def between_steps(self, iteration: int) -> Sequence[Job]:
        """See JobScheduler."""
        return ()

    def on_evaluated(self, evaluated: Sequence[Job]) -> None:
        """See JobScheduler."""

    def has_pending(self) -> bool:
        """See JobScheduler."""
        return False

    def unfinished(self) -> Sequence[tuple[str, int]]:
        """See JobScheduler."""
        return ()


IDLE_SECONDS = 0.2
"""Between two looks for live commands while every job is paused."""


class Loop:
    """Trains jobs to their ends. `iteration` counts the loop's iterations, `job.progress.step` the steps of one job."""

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job] | JobScheduler,
        checkpointer: CheckpointWriter,
        report: Callable[[Event], None],
        *,
        save_every: int | None,
        iteration: int = 0,
        stop_signal: StopSignal | None = None,
    ) -> None:
        self.engine = engine
        self.queue: JobScheduler = FixedJobs(jobs) if isinstance(jobs, Sequence) else jobs
        self.checkpointer = checkpointer
        self._report = report
        self._reporting = False
        self._pending_events: list[Event] = []
        self.save_every = save_every
        self.iteration = iteration
        self._stop_signal = stop_signal or StopSignal()
        self._heap = Heap()

    @property
    def jobs(self) -> list[Job]:
        """Those that have a slot."""
        return self.queue.jobs

    def run(self) -> bool:
        """Train until every job has ended or a stop is requested, and save the last state. Returns whether all have
        ended."""
        with self._stop_signal, self._stop_signal.saving(self._notify_stop):
            if not self._stop_signal.poll():
                self._begin()
            while not self._stop_signal.poll() and (active := self._next()) is not None:
                if not active:
                    time.sleep(IDLE_SECONDS)
                    continue
                self._answer([job.rollouts for job in active if job.rollouts is not None])
                self._step(active)
                evaluated = [job for job in active if job.evaluates_now()]
                self._evaluate(evaluated, active)
                self.queue.on_evaluated(evaluated)
                self._finish([job for job in active if not job.active])
                going_on = any(job.active for job in active) or self.queue.has_pending()
                if self.save_every and self.iteration % self.save_every == 0 and going_on:
                    self._save()
            waiting = self.queue.unfinished()
            done = not waiting and not any(job.active for job in self.jobs)
            if not done:
                for job in self.jobs:
                    if job.active:
                        kept = bytes_of_state(self.engine.jobs[job.slot].optimizer)
                        self._notify(JobFinished(job.name, job.progress.step, "interrupted", kept))
                for name, step in waiting:
                    self._notify(JobFinished(name, step, "interrupted"))
            self._save()
            for job in self.jobs:
                if job.active:  # stopped early: after the checkpoint, what there is can be talked to
                    self.checkpointer.save_adapter(job, "last")
        return done

    def _begin(self) -> None:
        """Evaluate before the first step. Evaluations that a broken file has put off may end a job."""
        due = [job for job in self.jobs if job.evaluates_at_the_start()]
        owing = [job for job in due if job.progress.owes_evaluation]
        self._evaluate(due)
        if owing:
            self.queue.on_evaluated(owing)
            self._finish([job for job in owing if not job.active])

    def _next(self) -> list[Job] | None:
        """Return the jobs that take the next step; none while all are paused; None if all have ended."""
        came = self.queue.between_steps(self.iteration)
        self._evaluate([job for job in came if job.evaluates_at_the_start()])
        active = [job for job in self.jobs if job.active]
        return active if active or self.queue.has_pending() else None

    def _notify(self, event: Event) -> None:
        self._reporting = True
        try:
            self._report(event)
        finally:
            self._reporting = False
        while self._pending_events:
            self._notify(self._pending_events.pop(0))

    def _answer(self, answering: list[RolloutSource]) -> None:
        """Submit the prompts of all jobs, then answer them together. Where a reward function or the stream of prompts
        fails, a checkpoint is saved first, so that no step is lost."""
        try:
            for rollouts in answering:
                rollouts.submit()
            for rollouts in answering:
                rollouts.answer()
        except Exception as error:
            if isinstance(error, LowrankError) or self.engine.lanes.ranks.world == 1:
                self._save()
            raise

    def _step(self, active: list[Job]) -> None:
        started = time.perf_counter()
        before = snapshot(self.jobs)
        rates = {job.slot: job.next_learning_rate() for job in active}
        with self._checkpoint_on_bad_media(before):
            work = self._next_steps(active, before)
        next_segments = [segment for job in active for segment in _peek(job.dataloader)]
        with self._checkpoint_on_bad_media(before):
            forwarded = self.engine.forward_backward(work, rates, next_segments)
        updated = {job.slot: self.engine.optim_step(job.slot, rates[job.slot]) for job in active}
        self.iteration += 1
        self._heap.after_step()
        seconds = time.perf_counter() - started
        for job in active:
            job.count_step(updated[job.slot].skipped, overflowed=updated[job.slot].loss_scale is not None)
            self._report_step(job, forwarded[job.slot], updated[job.slot], rates[job.slot], seconds)

    def _next_steps(self, active: Sequence[Job], before: Sequence[Job]) -> dict[int, list[Segment]]:
        """Take the next step of every job's dataloader; returns the segments by slot. Where one fails (a stream's file
        or network, or a row that the settings refuse), a checkpoint of the jobs as they were `before` is saved."""
        try:
            return {job.slot: job.dataloader.next_step() for job in active}
        except BadMedium:  # of a stream that is compared with the base as it is read
            raise
        except Exception as error:
            if self.engine.lanes.ranks.world > 1:  # others wait for this rank, so no checkpoint can be written
                raise
            self._save(before)
            if isinstance(error, DataError):
                raise stream_error(error, self._written_now()) from error
            raise

    def _written_now(self) -> str:
        return f"the checkpoint of step {self.iteration}, written now"

    def _report_step(
        self, job: Job, forwarded: ForwardResult, updated: UpdateResult, rate: float, seconds: float
    ) -> None:
        if job.rollouts is not None:
            forwarded = _as_rewarded(forwarded, job.rollouts.metrics)
        self._notify(
            StepDone(
                job=job.name,
                step=job.progress.step,
                epoch=job.dataloader.epoch,
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
            self._notify(Notice(f"{text}loss scale is {updated.loss_scale:g} from now on", job=job.name))
        elif updated.skipped:
            row = job.progress.skipped_in_a_row
            self._notify(
                Notice(
                    f"step {job.progress.step} of {job.name} gave a loss or gradient that is not finite; the step was "
                    f"skipped ({row} in a row, the job stops after {job.max_skipped_steps + 1})",
                    level="warning",
                    job=job.name,
                )
            )

    def _evaluate(self, due: list[Job], ending: Sequence[Job] = ()) -> None:
        """Evaluate the jobs that are due. `ending`: the jobs that took the step before."""
        if due:
            with self._checkpoint_on_bad_media(self.jobs, ending, due):
                self._evaluate_together(due)

    def _evaluate_together(self, due: list[Job]) -> None:
        plain = {job.slot: job.held_out for job in due if job.rollouts is None}
        by_row = [job.slot for job in due if job.keep_row_losses and job.rollouts is None and job.answers is None]
        results = self.engine.evaluate(plain, **({"by_row": by_row} if by_row else {})) if plain else {}
        results |= {job.slot: job.rollouts.evaluate() for job in due if job.rollouts is not None}
        scored = {job.slot: job.answers for job in due if job.answers is not None}
        scores = self._score_answers(scored) if scored else {}
        for job in due:
            result, answered = results[job.slot], scores.get(job.slot, Scored({}))
            best = job.count_evaluation(result.loss, answered.metrics.get(job.eval_metric))
            if best:
                job.progress.best_rows = _rows(result, answered) if job.keep_row_losses else None
                self.checkpointer.save_adapter(job, "best")
            tokens = result.totals.get("tokens", 0.0)
            metrics = {**result.metrics, **answered.metrics}
            self._notify(EvalDone(job.name, job.progress.step, result.loss, tokens, best, metrics, job.eval_metric))

    def _score_answers(self, held_out: Mapping[int, HeldOutAnswers]) -> dict[int, Scored]:
        """Score generated answers on the first rank, since they decide which adapter is the best on all ranks."""
        ranks = self.engine.lanes.ranks
        if ranks.world == 1:
            return score_answers(self.engine.base, self.engine.bank, held_out)
        found = agree(ranks, lambda: _as_json(score_answers(self.engine.base, self.engine.bank, held_out)))
        return {int(slot): Scored(scored["metrics"], tuple(scored["rows"])) for slot, scored in found.items()}

    @contextlib.contextmanager
    def _checkpoint_on_bad_media(
        self, jobs: Sequence[Job], ending: Sequence[Job] = (), due: Sequence[Job] = ()
    ) -> Generator[None]:
        """Context that saves a checkpoint of `jobs` and raises DataError where a media file of a row is broken or
        missing. Jobs of `ending` that have ended are finished first; those in `due` are evaluated after a resume."""
        try:
            yield
        except BadMedium as error:
            last = "the last checkpoint"
            if self.engine.lanes.ranks.world == 1:  # else others wait for this rank, so no checkpoint can be written
                for job in due:
                    job.progress.owes_evaluation = True
                self._finish([job for job in ending if not job.active])
                self._save(jobs)
                last = self._written_now()
            raise bad_media_error(error, last) from error

    def _finish(self, finished: list[Job]) -> None:
        for job in finished:
            finish_job(self.engine, self.checkpointer, job, self._notify)

    def _save(self, jobs: Sequence[Job] | None = None) -> None:
        """Save a checkpoint of `jobs`, by default of all as they are now."""
        jobs = self.jobs if jobs is None else jobs
        self._notify(CheckpointSaved(self.iteration, self.checkpointer.checkpoint(self.iteration, jobs)))

    def _notify_stop(self, text: str) -> None:
        """Report a stop request. A signal handler may call this while a reporter writes, so the event may have to
        wait."""
        notice = Notice(text, "warning")
        if self._reporting:
            self._pending_events.append(notice)
        else:
            self._notify(notice)


def _rows(result: ForwardResult, answered: Scored) -> list[list[float]] | None:
    """Return `JobProgress.best_rows`: of generated answers where they are scored, each with the same weight, else of
    losses."""
    if answered.rows:
        number = len(answered.rows)
        return [[value / number for value in answered.rows], [1.0] * number]
    return result.rows and [list(result.rows.loss_terms), list(result.rows.counts)]


def finish_job(engine: Engine, checkpointer: CheckpointWriter, job: Job, report: Callable[[Event], None]) -> None:
    """Save the adapter of a job that has ended, and report its end."""
    checkpointer.save_adapter(job, "last")
    if job.progress.best_step is None:  # nothing was held out: the last is the best there is
        checkpointer.save_adapter(job, "best")
    kept = bytes_of_state(engine.jobs[job.slot].optimizer)
    report(JobFinished(job.name, job.progress.step, job.progress.finished or "done", kept))
    note = note_on_best(job.progress.best_step, job.progress.step)
    if note is not None:
        report(Notice(note, level="warning", job=job.name))


def _peek(steps: StepSource) -> Sequence[Segment]:
    """Return the segments of the next step, where they are known."""
    return steps.peek_next_step() if isinstance(steps, PeekableSteps) else ()


def _as_rewarded(forwarded: ForwardResult, metrics: dict[str, float]) -> ForwardResult:
    """Return the result with minus the mean reward as loss: the policy loss, whose gradient is taken, is always near
    0."""
    shown = {**metrics, **forwarded.metrics, "policy_loss": forwarded.loss}
    return replace(forwarded, loss=-metrics["reward"], metrics=shown)


def _as_json(scores: Mapping[int, Scored]) -> dict[str, dict[str, object]]:
    return {str(slot): asdict(scored) for slot, scored in scores.items()}
