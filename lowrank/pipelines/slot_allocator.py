"""Jobs into their slots and out of them: everything that is between a job's settings and its place in the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lowrank.batches import BARE_BASE
from lowrank.config import JobConfig, RunConfig
from lowrank.data.prepare import Prepared
from lowrank.errors import LowrankError
from lowrank.pipelines.job_setup import (
    may_share_prompts,
    name_unreached,
    set_up_rollouts,
    start_job,
)
from lowrank.pipelines.references import compute_references, load_reference_base
from lowrank.report.events import Event, JobStarted, Notice
from lowrank.train.engine import Engine
from lowrank.train.job import Job
from lowrank.train.rollout_generator import RolloutGenerator


class SlotAllocator:
    """The slots of one engine. Data, settings and slot numbers are given in the order of the jobs."""

    def __init__(self, engine: Engine, run: RunConfig, tokenizer: Any, report: Callable[[Event], None]) -> None:
        self.engine, self._run, self._tokenizer, self._report = engine, run, tokenizer, report
        self._answering = RolloutGenerator(
            engine.base, engine.bank, engine.lanes, notify=lambda text: report(Notice(text, level="warning"))
        )

    def take(
        self, configs: Sequence[JobConfig], data: Sequence[Prepared], slots: Sequence[int | None] | None = None
    ) -> list[Job]:
        """Jobs at their beginning, each in a slot: the one it had (`slots`, where a run goes on), or the first that is
        free. Raises what lowrank.errors has for adapters and data that do not fit the base."""
        engine, before = self.engine, set(self.engine.bank.slots)
        engine.shares_prompts = engine.shares_prompts or may_share_prompts(engine.base, configs)
        places = slots or [None] * len(configs)
        try:
            jobs = [
                start_job(engine, config, own, self._run, self._report, slot)
                for config, own, slot in zip(configs, data, places)
            ]
            name_unreached(engine, jobs, self._report)
            set_up_rollouts(engine, jobs, data, configs, self._tokenizer, self._answering)
            load_reference_base(engine, configs, self._run.model, self._report)
            compute_references(engine, jobs, data, configs, self._run.model, self._report)
        except LowrankError:  # others may be training: what does not fit leaves nothing behind
            for slot in engine.bank.slots.keys() - before:
                engine.jobs.pop(slot, None)
                engine.bank.remove(slot)
            raise
        return jobs

    def leave(self, job: Job) -> None:
        """Free a job's slot, and the memory of its adapter and optimizer."""
        assert job.slot != BARE_BASE, "the base's own parameters leave with the base"
        self.engine.remove(job.slot)
        self.engine.bank.remove(job.slot)
        if job.rollouts is not None and job.rollouts.reward_slot is not None:
            self.engine.bank.remove(job.rollouts.reward_slot)

    def num_trainable(self, job: Job) -> int:
        """Trainable numbers of a job that has a slot."""
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
    """What people are told of a job."""
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
