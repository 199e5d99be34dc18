"""All jobs of a run: those that have a slot, and those that wait for one, are paused, or have finished.

A job that loses its slot after some steps is parked: the checkpointer keeps its state as in a checkpoint
(train/checkpointer.py) and restores it to the bit when the job has a slot again. Slots change only between two steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lowrank.batches import BASE_SLOT
from lowrank.checkpoints.live_commands import CommandQueue
from lowrank.config import JobConfig
from lowrank.errors import LowrankError
from lowrank.pipelines.job_setup import num_steps_of
from lowrank.pipelines.queued_job import FINISHED, PAUSED, QUEUED, RUNNING, WAITING_FOR_RUNG, QueuedJob
from lowrank.pipelines.slot_allocator import SlotAllocator, job_started
from lowrank.report.events import Event, JobFinished, JobMoved, JobStarted, Notice
from lowrank.search.candidates import Candidate
from lowrank.train.checkpointer import Checkpointer
from lowrank.train.job import Job, JobProgress
from lowrank.train.loop import finish_job
from lowrank.train.schedule import length_notice


class Search(Protocol):
    """A hyperparameter search, which decides which jobs go on (search/sweep.py). What its methods return are new states
    by job name: RUNNING (the job goes on), WAITING_FOR_RUNG, or FINISHED (it is pruned); other jobs keep theirs."""

    def on_started(self, job: Job) -> None:
        """Called when a job is given a slot, at its beginning and after each time it was parked."""
        ...

    def on_evaluated(self, evaluated: Sequence[Job]) -> Mapping[str, str]:
        """Called when jobs were evaluated on their held-out rows, all after the same step; returns new states."""
        ...

    def on_finished(self, job: Job) -> Mapping[str, str]:
        """Called when a job that has taken steps ends, for whatever reason; returns new states for other jobs."""
        ...

    def on_failed(self, name: str, reason: str) -> Mapping[str, str]:
        """Called when a job ends before its first step: "failed" (it does not fit the base) or "stopped" (a command);
        returns new states for other jobs."""
        ...

    def propose(self) -> Candidate | None:
        """Called when a slot is free and no job waits for it; returns one more candidate, None if there is none."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the search, as plain JSON."""
        ...


class JobQueue:
    """The jobs of a run: the loop takes steps of those that have slots (`JobScheduler`, train/loop.py); live commands
    and a search change them between two steps."""

    def __init__(
        self,
        allocator: SlotAllocator,
        checkpointer: Checkpointer,
        entries: Sequence[QueuedJob],
        report: Callable[[Event], None],
        capacity: int,
    ) -> None:
        self.allocator, self.checkpointer, self._report = allocator, checkpointer, report
        self.entries = {entry.name: entry for entry in entries}
        self.capacity = capacity
        """How many jobs take steps at the same time."""
        self.jobs: list[Job] = []
        self.search: Search | None = None
        self.make_entry: Callable[[Candidate], QueuedJob] | None = None
        """Makes a job of what the search proposes; LowrankError for one that cannot be trained."""
        self.on_decision: Callable[[], object] = lambda: None
        """Called after the search has decided about a job."""
        self.before_step: Callable[[int], None] = lambda iteration: None
        """Carries live commands out (pipelines/live_commands.py)."""
        self.command_queue: CommandQueue | None = None
        self._new_jobs: list[Job] = []
        """Jobs that were given a slot since the last step."""
        for turn, entry in enumerate(entries):
            entry.turn = turn
        self._turns = len(entries)

    # For the loop

    def between_steps(self, iteration: int) -> Sequence[Job]:
        """See JobScheduler. Jobs that a search holds back are parked, then live commands are carried out, then free
        slots go to jobs that wait."""
        self._release_held()  # first: what a command ends may decide about them, and what is parked ends in one way
        self.before_step(iteration)
        self._preempt()
        came = self._new_jobs
        if self.search is not None:
            self._release_finished()
        while len(self._active()) < self.capacity:
            entry = self._next_waiting() or self._proposed()
            if entry is None:
                break
            self._release_finished()
            try:
                came.append(self._allocate(entry))
            except LowrankError as error:  # its adapter does not fit this base: that is its own affair
                self._fail(entry, error)
        self._new_jobs = []
        return came

    def on_evaluated(self, evaluated: Sequence[Job]) -> None:
        """See JobScheduler. The search decides, if there is one."""
        if self.search is None:
            return
        decided = self.search.on_evaluated(evaluated)
        self._apply(decided)
        ended = [job for job in self.jobs if not job.active]
        for job in ended:
            self._apply(self.search.on_finished(job))
        if decided or ended:
            self.on_decision()

    def has_pending(self) -> bool:
        """See JobScheduler."""
        return bool(self.unfinished())

    def unfinished(self) -> Sequence[tuple[str, int]]:
        """See JobScheduler."""
        waiting = (QUEUED, PAUSED, WAITING_FOR_RUNG)
        return [(each.name, each.progress.step) for each in self.entries.values() if each.state in waiting]

    # For live commands and a search

    def add(self, entry: QueuedJob, *, now: bool = False) -> None:
        """Add a job, which waits for its slot, or is given one `now`. LowrankError for one that cannot begin; then the
        queue is as before."""
        entry.turn, self._turns = self._turns, self._turns + 1
        self.entries[entry.name] = entry
        if not now:
            self._report(self.started(entry.name))
            return
        try:
            self._new_jobs.append(self._allocate(entry))
        except LowrankError:
            del self.entries[entry.name]
            self.checkpointer.parked.pop(entry.name, None)
            raise

    def stop(self, name: str, reason: str) -> None:
        """End a job now; its adapter is kept as `last`. A job that took no step leaves none."""
        entry, job = self.entries[name], self.job(name)
        if job is not None:
            job.progress.finished = reason
            finish_job(self.allocator.engine, self.checkpointer, job, self._report)
            if self.search is not None:
                self._apply_decisions(self.search.on_finished(job))
            return
        if entry.progress.step:  # its weights are in its parked state alone
            job = self._allocate(entry, quietly=True)
            self.stop(name, reason)
            self._release_slot(job)
            return
        entry.progress.finished, entry.state = reason, FINISHED
        self.checkpointer.parked.pop(name, None)
        self._report(JobFinished(name, 0, reason))
        if self.search is not None:
            self._apply_decisions(self.search.on_failed(name, reason))

    def pause(self, name: str) -> None:
        """Park a job, or keep it waiting, until `resume`."""
        job = self.job(name)
        if job is not None:
            self._park(job, PAUSED)
        else:
            entry = self.entries[name]
            entry.state = PAUSED
            self._report(JobMoved(name, entry.progress.step, PAUSED))

    def resume(self, name: str) -> None:
        """Let a paused job wait for a slot again, before all others of its priority."""
        entry = self.entries[name]
        entry.state = QUEUED
        entry.turn = min(each.turn for each in self.entries.values()) - 1
        self._report(JobMoved(name, entry.progress.step, QUEUED))

    def change(self, name: str, config: JobConfig) -> None:
        """Give a job other settings, in effect from its next step on. Only those that may change while it trains differ
        (pipelines/live_commands.py)."""
        entry, job = self.entries[name], self.job(name)
        if entry.config.schedule == config.schedule:
            before, now = num_steps_of(entry.config, entry.data), num_steps_of(config, entry.data)
            step = self.progress_of(name).step
            notice = length_notice(config.schedule, config.optimizer.learning_rate, step, before, now)
            if notice is not None:
                self._report(Notice(notice, level="warning", job=name))
        entry.config, entry.changed = config, True
        if job is not None:
            self._adjust(job, entry)
            self._report(self.started(name))

    def job(self, name: str) -> Job | None:
        """Return the job of this name if it has a slot and takes steps, else None."""
        return next((job for job in self.jobs if job.name == name and job.active), None)

    def progress_of(self, name: str) -> JobProgress:
        """Return how far a job is, with or without a slot."""
        in_slot = next((job for job in self.jobs if job.name == name), None)
        return self.entries[name].progress if in_slot is None else in_slot.progress

    def started(self, name: str) -> JobStarted:
        """Return the event that describes a job as it is now."""
        entry = self.entries[name]
        progress = self.progress_of(name)
        return job_started(
            entry.config,
            num_steps=num_steps_of(entry.config, entry.data),
            num_trainable=entry.num_trainable,
            first_step=progress.step,
            finished=progress.finished,
            state=QUEUED if entry.state == WAITING_FOR_RUNG else RUNNING if entry.state == FINISHED else entry.state,
            pictures=entry.data.has_pictures,
        )

    # For checkpoints

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the queue beside the jobs' own states, as plain JSON."""
        slots = {job.name: job.slot for job in self.jobs}
        jobs = {entry.name: entry.to_json(slots.get(entry.name)) for entry in self.entries.values()}
        search = None if self.search is None else self.search.state()
        commands = [] if self.command_queue is None else sorted(self.command_queue.carried_out)
        return {"jobs": jobs, "commands": commands, "capacity": self.capacity, "turns": self._turns, "search": search}

    def allocate_slots(self, state: Mapping[str, Any] | None) -> None:
        """Give the first jobs their slots; where a run is resumed (`state`: what `state` has returned), each job the
        slot that it had."""
        if state is None:
            first = list(self.entries.values())[: self.capacity]
            slots: list[int | None] = [None] * len(first)
        else:
            self.capacity, self._turns = state["capacity"], state["turns"]
            for name, kept in state["jobs"].items():
                self.entries[name].restore(kept)
            slot_of = {name: kept["slot"] for name, kept in state["jobs"].items() if kept["slot"] is not None}
            first = sorted((self.entries[name] for name in slot_of), key=lambda entry: slot_of[entry.name])
            slots = [slot_of[entry.name] for entry in first]
        self.jobs += self.allocator.allocate([each.config for each in first], [each.data for each in first], slots)
        for entry, job in zip(first, self.jobs):
            entry.state = RUNNING if entry.state == QUEUED else entry.state
            entry.num_trainable = self.allocator.num_trainable(job)
            if self.search is not None:
                self.search.on_started(job)

    def parked_names(self) -> list[str]:
        """Return the jobs without a slot, whose states a checkpoint may hold."""
        in_slots = {job.name for job in self.jobs}
        return [name for name in self.entries if name not in in_slots]

    # Slots

    def _active(self) -> list[Job]:
        return [job for job in self.jobs if job.active]

    def _proposed(self) -> QueuedJob | None:
        """Return one more candidate as a job, if the search has one that can be trained."""
        while self.search is not None and (candidate := self.search.propose()) is not None:
            assert self.make_entry is not None
            try:
                entry = self.make_entry(candidate)
            except LowrankError as error:
                self._report(Notice(f"candidate {candidate.name} cannot be trained: {error}", level="warning"))
                self._apply_decisions(self.search.on_failed(candidate.name, "failed"))
                continue
            self.add(entry)
            return entry
        return None

    def _fail(self, entry: QueuedJob, error: LowrankError) -> None:
        entry.progress.finished, entry.state = "failed", FINISHED
        self.checkpointer.parked.pop(entry.name, None)
        self._report(Notice(f"{entry.name} cannot be trained: {error}", level="warning", job=entry.name))
        self._report(JobFinished(entry.name, entry.progress.step, "failed"))
        if self.search is not None:
            self._apply_decisions(self.search.on_failed(entry.name, "failed"))

    def _next_waiting(self) -> QueuedJob | None:
        waiting = [entry for entry in self.entries.values() if entry.state == QUEUED]
        return min(waiting, key=lambda entry: (-entry.priority, entry.turn), default=None)

    def _preempt(self) -> None:
        """Park running jobs for waiting ones of higher priority."""
        while (waiting := self._next_waiting()) is not None and len(self._active()) >= self.capacity:
            lowest = min(self._active(), key=lambda job: self.entries[job.name].priority, default=None)
            if lowest is None or self.entries[lowest.name].priority >= waiting.priority:
                return
            self._park(lowest, QUEUED)

    def _allocate(self, entry: QueuedJob, quietly: bool = False) -> Job:
        (job,) = self.allocator.allocate([entry.config], [entry.data])
        if entry.name in self.checkpointer.parked:
            self.checkpointer.unpark(job)
        self._adjust(job, entry)
        if self.search is not None:
            self.search.on_started(job)
        self.jobs.append(job)
        entry.state, entry.num_trainable = RUNNING, self.allocator.num_trainable(job)
        if not quietly:
            self._report(self.started(entry.name))
        return job

    def _adjust(self, job: Job, entry: QueuedJob) -> None:
        """Bring what live commands may change up to date with the settings of `entry`."""
        config, trained = entry.config, self.allocator.engine.jobs[job.slot]
        job.schedule, job.patience = config.schedule, config.early_stopping_patience
        job.learning_rate, job.max_skipped_steps = config.optimizer.learning_rate, config.optimizer.max_skipped_steps
        job.num_steps = trained.num_steps = num_steps_of(config, entry.data)
        trained.settings = config.optimizer

    def _park(self, job: Job, state: str) -> None:
        entry = self.entries[job.name]
        self.checkpointer.park(job)
        entry.state, entry.progress = state, dataclasses.replace(job.progress)
        self._release_slot(job)
        self._report(JobMoved(job.name, entry.progress.step, QUEUED if state == WAITING_FOR_RUNG else state))

    def _release_slot(self, job: Job) -> None:
        entry = self.entries[job.name]
        if not job.active:
            entry.state, entry.progress = FINISHED, dataclasses.replace(job.progress)
        self.jobs.remove(job)
        self.allocator.release(job)

    def _release_finished(self) -> None:
        for job in [job for job in self.jobs if not job.active and job.slot != BASE_SLOT]:
            self._release_slot(job)

    def _release_held(self) -> None:
        """Park the jobs about which a search has not decided yet, so that others can use their slots."""
        for job in self._active():
            if self.entries[job.name].state == WAITING_FOR_RUNG:
                self._park(job, WAITING_FOR_RUNG)

    def _apply_decisions(self, states: Mapping[str, str]) -> None:
        """Apply what a search has decided outside `on_evaluated`, and call `on_decision`."""
        self._apply(states)
        self.on_decision()

    def _apply(self, states: Mapping[str, str]) -> None:
        """Apply the new states that a search has returned."""
        for name, state in states.items():
            entry, job = self.entries[name], self.job(name)
            if state == FINISHED:
                if job is not None:
                    job.progress.finished = "pruned"
                else:
                    self._prune_parked(entry)
            elif job is not None:
                entry.state = RUNNING if state == RUNNING else WAITING_FOR_RUNG
            elif state == RUNNING:
                entry.state = QUEUED

    def _prune_parked(self, entry: QueuedJob) -> None:
        entry.progress.finished, entry.state = "pruned", FINISHED
        self.checkpointer.parked.pop(entry.name, None)
        self._report(JobFinished(entry.name, entry.progress.step, "pruned"))
