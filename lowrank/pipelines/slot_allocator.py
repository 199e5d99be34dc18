"""Slot allocation: everything between a job's settings and its place in the loop, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lowrank.batches import BASE_SLOT
from lowrank.config import JobConfig, RunConfig
from lowrank.data.prepare import Prepared
from lowrank.errors import LowrankError
from lowrank.pipelines.job_setup import (
    may_share_prompts,
    report_unreached_modules,
    set_up_rollouts,
    start_job,
)
from lowrank.pipelines.references import compute_references, load_reference_base
from lowrank.report.events import Event, JobStarted, Notice
from lowrank.train.engine import Engine
from lowrank.train.job import Job
from lowrank.train.rollout_generator import RolloutGenerator


class SlotAllocator:
    """Gives jobs the slots of one engine and frees them. Lists of data, settings and slots are in the order of the
    jobs."""

    def __init__(self, engine: Engine, run: RunConfig, tokenizer: Any, report: Callable[[Event], None]) -> None:
        self.engine, self._run, self._tokenizer, self._report = engine, run, tokenizer, report
        self._answering = RolloutGenerator(
            engine.base, engine.bank, engine.lanes, notify=lambda text: report(Notice(text, level="warning"))
        )

    def allocate(
        self, configs: Sequence[JobConfig], data: Sequence[Prepared], slots: Sequence[int | None] | None = None
    ) -> list[Job]:
        """Put jobs at their beginning into slots: those in `slots`, where a run is resumed, else the first free ones.
        Return them in the given order. LowrankError for adapters and data that do not fit the base; then no slot has
        changed."""
        engine, before = self.engine, set(self.engine.bank.slots)
        engine.shares_prompts = engine.shares_prompts or may_share_prompts(engine.base, configs)
        try:
            jobs = [
                start_job(engine, config, prepared, self._run, self._report, slot)
                for config, prepared, slot in zip(configs, data, slots or [None] * len(configs))
            ]
            report_unreached_modules(engine, jobs, self._report)
            set_up_rollouts(engine, jobs, data, configs, self._tokenizer, self._answering)
            load_reference_base(engine, configs, self._run.model, self._report)
            compute_references(engine, jobs, data, configs, self._run.model, self._report)
        except LowrankError:  # others may be training: what does not fit leaves nothing behind
            for slot in engine.bank.slots.keys() - before:
                engine.jobs.pop(slot, None)
                engine.bank.remove(slot)
            raise
        return jobs

    def release(self, job: Job) -> None:
        """Free a job's slot, and the memory of its adapter and optimizer."""
        assert job.slot != BASE_SLOT, "the base's own parameters have no slot to free"
        self.engine.remove(job.slot)
        self.engine.bank.remove(job.slot)
        if job.rollouts is not None and job.rollouts.reward_slot is not None:
            self.engine.bank.remove(job.rollouts.reward_slot)

    def num_trainable(self, job: Job) -> int:
        """Return the number of trainable parameters of a job that has a slot."""
        return sum(each.numel() for each in self.engine.jobs[job.slot].parameters.values())


def job_started(
    config: JobConfig,
    *,
    num_steps: int,
    num_trainable: int,
    first_step: int = 0,
    finished: str | None = None,
    state: str = "running",
    pictures: bool = False,
) -> JobStarted:
    """Return the event that describes a job."""
    of_base = {"full": "all parameters", "freeze": "some layers"}
    what = of_base.get(config.tuning) or config.adapter.title
    return JobStarted(
        name=config.name,
        num_steps=num_steps,
        first_step=first_step,
        num_epochs=config.num_train_epochs,
        num_trainable=num_trainable,
        description=f"{what}, lr {config.optimizer.learning_rate:g}",
        finished=finished,
        state=state,
        pictures=pictures,
    )
