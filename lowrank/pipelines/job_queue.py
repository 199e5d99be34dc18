"""All jobs of a run: those that have a slot, and those that wait for one, are paused, or are over.

A job without a slot that has taken steps is parked: its state, as in a checkpoint, is kept beside the bank
(train/checkpointer.py), and put back when it has a slot again, to the bit. Slots change hands between two steps only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lowrank.batches import BARE_BASE
from lowrank.checkpoints.orders import OrderQueue
from lowrank.config import JobConfig
from lowrank.errors import LowrankError
from lowrank.pipelines.job_setup import num_steps_of
from lowrank.pipelines.queued_job import HELD, OVER, PAUSED, QUEUED, RUNNING, QueuedJob
from lowrank.pipelines.slot_allocator import SlotAllocator, job_started
from lowrank.report.events import Event, JobFinished, JobMoved, JobStarted, Notice
from lowrank.search.candidates import Candidate
from lowrank.train.checkpointer import Checkpointer
from lowrank.train.job import Job, JobProgress
from lowrank.train.loop import finish_job


class Search(Protocol):
    """Who decides which jobs are worth going on with (search/sweep.py)."""

    def begin(self, job: Job) -> None:
        """A job has a slot."""
        ...

    def judge(self, evaluated: Sequence[Job]) -> Mapping[str, str]:
        """By name, what becomes of jobs: RUNNING (it goes on), HELD, OVER (it is pruned). Others stay as they are."""
        ...

    def over(self, job: Job) -> Mapping[str, str]:
        """A job has ended; what becomes of others by that."""
        ...

    def lost(self, name: str, reason: str) -> Mapping[str, str]:
        """A job is over that never began; what becomes of others by that."""
        ...

    def propose(self) -> Candidate | None:
        """One job more, when there is a slot and nobody waits."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint."""
        ...


class JobQueue:
    """What the loop knows as `JobQueue`, and what orders and a search act on."""

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
        """Jobs that take steps at the same time."""
        self.jobs: list[Job] = []
        self.search: Search | None = None
        self.enlist: Callable[[Candidate], QueuedJob] | None = None
        """Makes a job of what the search proposes."""
        self.decided: Callable[[], object] = lambda: None
        """Hears that the search has decided something."""
        self.before_step: Callable[[int], None] = lambda tick: None
        """Carries orders out (pipelines/orders.py)."""
        self.order_queue: OrderQueue | None = None
        self._came: list[Job] = []
        """Given a slot since the last step."""
        for turn, entry in enumerate(entries):
            entry.turn = turn
        self._turns = len(entries)

    # What the loop asks

    def between_steps(self, tick: int) -> Sequence[Job]:
        """Those that a search holds back leave; then orders; then free slots go to those that wait."""
        self._hold_back()  # first: what an order ends may decide about them, and what is parked ends in one way
        self.before_step(tick)
        self._make_way()
        came = self._came
        if self.search is not None:
            self._leave_finished()
        while len(self._active()) < self.capacity:
            entry = self._next_waiting() or self._proposed()
            if entry is None:
                break
            self._leave_finished()
            try:
                came.append(self._allocate(entry))
            except LowrankError as error:  # its adapter does not fit this base: that is its own affair
                self._lose(entry, error)
        self._came = []
        return came

    def judge(self, evaluated: Sequence[Job]) -> None:
        """Ask the search, if there is one."""
        if self.search is None:
            return
        decided = self.search.judge(evaluated)
        self._follow(decided)
        ended = [job for job in self.jobs if not job.active]
        for job in ended:
            self._follow(self.search.over(job))
        if decided or ended:
            self.decided()

    def waits(self) -> bool:
        """Whether a job may come though none has a slot."""
        return bool(self.unfinished())

    def unfinished(self) -> Sequence[tuple[str, int]]:
        """Name and step of jobs without a slot that are not over."""
        waiting = (QUEUED, PAUSED, HELD)
        return [(each.name, each.progress.step) for each in self.entries.values() if each.state in waiting]

    # What orders and a search do

    def add(self, entry: QueuedJob, *, now: bool = False) -> None:
        """One job more, which waits for its slot, or is given one `now`. LowrankError for one that cannot begin: then
        it never came."""
        entry.turn, self._turns = self._turns, self._turns + 1
        self.entries[entry.name] = entry
        if not now:
            self._report(self.started(entry.name))
            return
        try:
            self._came.append(self._allocate(entry))
        except LowrankError:
            del self.entries[entry.name]
            self.checkpointer.parked.pop(entry.name, None)
            raise

    def stop(self, name: str, reason: str) -> None:
        """End a job now; its adapter is kept as `last`. One that never began leaves none."""
        entry, job = self.entries[name], self.job(name)
        if job is not None:
            job.progress.finished = reason
            self._report(finish_job(self.allocator.engine, self.checkpointer, job))
            if self.search is not None:
                self._heed(self.search.over(job))
            return
        if entry.progress.step:  # its weights are in its parked state alone
            job = self._allocate(entry, quietly=True)
            self.stop(name, reason)
            self._leave(job)
            return
        entry.progress.finished, entry.state = reason, OVER
        self.checkpointer.parked.pop(name, None)
        self._report(JobFinished(name, 0, reason))
        if self.search is not None:
            self._heed(self.search.lost(name, reason))

    def pause(self, name: str) -> None:
        """Take a job's slot until `resume`."""
        job = self.job(name)
        if job is not None:
            self._park(job, PAUSED)
        else:
            entry = self.entries[name]
            entry.state = PAUSED
            self._report(JobMoved(name, entry.progress.step, PAUSED))

    def resume(self, name: str) -> None:
        """Let a job that was paused wait for its slot, before those of its priority."""
        entry = self.entries[name]
        entry.state = QUEUED
        entry.turn = min(each.turn for each in self.entries.values()) - 1
        self._report(JobMoved(name, entry.progress.step, QUEUED))

    def change(self, name: str, config: JobConfig) -> None:
        """From the next step on with these settings, of which only those that may change differ
        (pipelines/orders.py)."""
        entry, job = self.entries[name], self.job(name)
        entry.config, entry.changed = config, True
        if job is not None:
            self._adjust(job, entry)
            self._report(self.started(name))

    def job(self, name: str) -> Job | None:
        """The job, if it has a slot and takes steps."""
        return next((job for job in self.jobs if job.name == name and job.active), None)

    def progress_of(self, name: str) -> JobProgress:
        """How far a job is, wherever it is."""
        seated = next((job for job in self.jobs if job.name == name), None)
        return self.entries[name].progress if seated is None else seated.progress

    def started(self, name: str) -> JobStarted:
        """What people are told of a job."""
        entry = self.entries[name]
        progress = self.progress_of(name)
        return job_started(
            entry.config,
            num_steps=num_steps_of(entry.config, entry.data),
            num_trainable=entry.num_trainable,
            first_step=progress.step,
            finished=progress.finished,
            state=QUEUED if entry.state == HELD else RUNNING if entry.state == OVER else entry.state,
            pictures=entry.data.has_pictures,
        )

    # For checkpoints

    def state(self) -> dict[str, Any]:
        """Plain JSON: what a run needs to know about its jobs beside their own states."""
        slots = {job.name: job.slot for job in self.jobs}
        jobs = {entry.name: entry.kept(slots.get(entry.name)) for entry in self.entries.values()}
        search = None if self.search is None else self.search.state()
        orders = [] if self.order_queue is None else sorted(self.order_queue.carried_out)
        return {"jobs": jobs, "orders": orders, "capacity": self.capacity, "turns": self._turns, "search": search}

    def allocate_slots(self, state: Mapping[str, Any] | None) -> None:
        """Give the first jobs their slots, or, where the run goes on (`state`), those that had one the same."""
        if state is None:
            first = list(self.entries.values())[: self.capacity]
            slots: list[int | None] = [None] * len(first)
        else:
            self.capacity, self._turns = state["capacity"], state["turns"]
            for name, kept in state["jobs"].items():
                self.entries[name].restore(kept)
            seated = {name: kept["slot"] for name, kept in state["jobs"].items() if kept["slot"] is not None}
            first = sorted((self.entries[name] for name in seated), key=lambda entry: seated[entry.name])
            slots = [seated[entry.name] for entry in first]
        self.jobs += self.allocator.take([each.config for each in first], [each.data for each in first], slots)
        for entry, job in zip(first, self.jobs):
            entry.state = RUNNING if entry.state == QUEUED else entry.state
            entry.num_trainable = self.allocator.num_trainable(job)
            if self.search is not None:
                self.search.begin(job)

    def parked_names(self) -> list[str]:
        """Jobs without a slot whose state a checkpoint may hold."""
        seated = {job.name for job in self.jobs}
        return [name for name in self.entries if name not in seated]

    # Slots

    def _active(self) -> list[Job]:
        return [job for job in self.jobs if job.active]

    def _proposed(self) -> QueuedJob | None:
        """A candidate more, if the search has one that can be trained."""
        while self.search is not None and (candidate := self.search.propose()) is not None:
            assert self.enlist is not None
            try:
                entry = self.enlist(candidate)
            except LowrankError as error:
                self._report(Notice(f"candidate {candidate.name} cannot be trained: {error}", level="warning"))
                self._heed(self.search.lost(candidate.name, "failed"))
                continue
            self.add(entry)
            return entry
        return None

    def _lose(self, entry: QueuedJob, error: LowrankError) -> None:
        entry.progress.finished, entry.state = "failed", OVER
        self.checkpointer.parked.pop(entry.name, None)
        self._report(Notice(f"{entry.name} cannot be trained: {error}", level="warning", job=entry.name))
        self._report(JobFinished(entry.name, entry.progress.step, "failed"))
        if self.search is not None:
            self._heed(self.search.lost(entry.name, "failed"))

    def _next_waiting(self) -> QueuedJob | None:
        waiting = [entry for entry in self.entries.values() if entry.state == QUEUED]
        return min(waiting, key=lambda entry: (-entry.priority, entry.turn), default=None)

    def _make_way(self) -> None:
        """Those of lower priority that run, for those of higher that wait."""
        while (waiting := self._next_waiting()) is not None and len(self._active()) >= self.capacity:
            lowest = min(self._active(), key=lambda job: self.entries[job.name].priority, default=None)
            if lowest is None or self.entries[lowest.name].priority >= waiting.priority:
                return
            self._park(lowest, QUEUED)

    def _allocate(self, entry: QueuedJob, quietly: bool = False) -> Job:
        (job,) = self.allocator.take([entry.config], [entry.data])
        if entry.name in self.checkpointer.parked:
            self.checkpointer.unpark(job)
        self._adjust(job, entry)
        if self.search is not None:
            self.search.begin(job)
        self.jobs.append(job)
        entry.state, entry.num_trainable = RUNNING, self.allocator.num_trainable(job)
        if not quietly:
            self._report(self.started(entry.name))
        return job

    def _adjust(self, job: Job, entry: QueuedJob) -> None:
        """What orders may change, as the settings have it now."""
        config, trained = entry.config, self.allocator.engine.jobs[job.slot]
        job.schedule, job.patience = config.schedule, config.early_stopping_patience
        job.learning_rate, job.max_skipped_steps = config.optimizer.learning_rate, config.optimizer.max_skipped_steps
        job.num_steps = trained.num_steps = num_steps_of(config, entry.data)
        trained.settings = config.optimizer

    def _park(self, job: Job, state: str) -> None:
        entry = self.entries[job.name]
        self.checkpointer.park(job)
        entry.state, entry.progress = state, dataclasses.replace(job.progress)
        self._leave(job)
        self._report(JobMoved(job.name, entry.progress.step, QUEUED if state == HELD else state))

    def _leave(self, job: Job) -> None:
        entry = self.entries[job.name]
        if not job.active:
            entry.state, entry.progress = OVER, dataclasses.replace(job.progress)
        self.jobs.remove(job)
        self.allocator.leave(job)

    def _leave_finished(self) -> None:
        for job in [job for job in self.jobs if not job.active and job.slot != BARE_BASE]:
            self._leave(job)

    def _hold_back(self) -> None:
        """Jobs about which a search has not decided yet give their slots to others."""
        for job in self._active():
            if self.entries[job.name].state == HELD:
                self._park(job, HELD)

    def _heed(self, decisions: Mapping[str, str]) -> None:
        """What a search says when a job is over outside `judge`."""
        self._follow(decisions)
        self.decided()

    def _follow(self, decisions: Mapping[str, str]) -> None:
        for name, state in decisions.items():
            entry, job = self.entries[name], self.job(name)
            if state == OVER:
                if job is not None:
                    job.progress.finished = "pruned"
                else:
                    self._prune_parked(entry)
            elif job is not None:
                entry.state = RUNNING if state == RUNNING else HELD
            elif state == RUNNING:
                entry.state = QUEUED

    def _prune_parked(self, entry: QueuedJob) -> None:
        entry.progress.finished, entry.state = "pruned", OVER
        self.checkpointer.parked.pop(entry.name, None)
        self._report(JobFinished(entry.name, entry.progress.step, "pruned"))
