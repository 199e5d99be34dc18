"""A run whose base is loaded: its queue of jobs, its settings on disk, and the live commands that it accepts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.checkpoints.atomic import write_text
from lowrank.checkpoints.live_commands import CommandQueue
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.checkpoints.run_folder import RunFolder
from lowrank.config import JobConfig, RunConfig
from lowrank.data.chat.chosen_template import chosen_templates
from lowrank.data.prepare import Prepared
from lowrank.pipelines.adapter_desync import AdapterDesyncCheck
from lowrank.pipelines.job_data import prepare_all
from lowrank.pipelines.job_queue import JobQueue
from lowrank.pipelines.live_commands import CommandHandler, StateFile
from lowrank.pipelines.media import prepare_media
from lowrank.pipelines.memory_plan import MemoryBudget, concurrent_jobs
from lowrank.pipelines.queued_job import QueuedJob
from lowrank.pipelines.rank_agreement import commands_of_first_rank
from lowrank.pipelines.rank_output import checkpointer_class
from lowrank.pipelines.saved_run import LIVE
from lowrank.pipelines.slot_allocator import SlotAllocator
from lowrank.ranks import agree
from lowrank.report.page import DATA_REPORT
from lowrank.report.summary import SummaryBuilder
from lowrank.train.engine import Engine
from lowrank.train.listeners import Listeners


def build_queue(
    engine: Engine,
    config: RunConfig,
    data: Sequence[Prepared],
    folder: Path,
    report: Listeners,
    run_state: Callable[[], dict[str, Any]],
) -> JobQueue:
    """Return the queue of the jobs of `config`, none of which has a slot yet, with its checkpointer. `data` is in the
    order of the jobs; `run_state` returns what a checkpoint holds of the run as a whole."""
    tokenizer = engine.base.tokenizer
    checkpointer = checkpointer_class(engine.lanes.ranks)(
        engine,
        folder,
        config.save_total_limit,
        run_state,
        chosen_templates({job.name: job.data for job in config.jobs}, tokenizer),
    )
    entries = [QueuedJob(job, prepared) for job, prepared in zip(config.jobs, data)]
    return JobQueue(
        SlotAllocator(engine, config, tokenizer, report), checkpointer, entries, report, concurrent_jobs(config)
    )


@dataclass(frozen=True)
class ActiveRun:
    """A run whose base is loaded. `config`: the effective settings; `initial_config`: those that the run began with
    (pipelines/saved_run.py)."""

    config: RunConfig
    initial_config: RunConfig
    folder: RunFolder
    queue: JobQueue
    summary: SummaryBuilder
    report: Listeners

    @property
    def engine(self) -> Engine:
        """The engine that trains all jobs."""
        return self.queue.allocator.engine

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the run as a whole, as plain JSON."""
        decided = {"micro_batch_tokens": self.engine.micro_batch_tokens, "lanes": self.engine.lanes.count}
        settings = {**self.initial_config.model_dump(mode="json"), **decided}
        return {"settings": settings, "summary": self.summary.state(), LIVE: self.queue.state()}

    def write_settings(self) -> None:
        """Write the run's settings with the jobs that it has now, and what was found in their data."""
        entries = self.queue.entries.values()
        self.folder.own(entry.name for entry in entries)
        config = self.config.model_copy(update={"jobs": tuple(entry.config for entry in entries)})
        settings = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
        write_text(self.folder.path / RUN_CONFIG, settings + "\n")
        found = {entry.name: entry.data.report.to_json() for entry in entries}
        write_text(self.folder.path / DATA_REPORT, json.dumps(found, ensure_ascii=False) + "\n")

    def accept_commands(self, done: Sequence[int], budget: MemoryBudget) -> StateFile:
        """From now on carry out live commands between steps, and show what the jobs do in a file, which is returned as
        the reporter to close. `done`: numbers of commands that the checkpoint has; `budget`: decides whether one more
        job fits."""
        queue, report, ranks = self.queue, self.report, self.engine.lanes.ranks
        base, read = self.engine.base, {}
        commands = CommandQueue(self.folder.path, done)
        commands.open()
        queue.command_queue = commands

        def prepare(job: JobConfig) -> Prepared:
            (prepared,) = prepare_all([job], self.config.model, base.tokenizer, report, strict=False, read=read)
            prepare_media(base, self.config.model, [prepared], report, running=True)
            queue.checkpointer.chat_templates |= chosen_templates({job.name: job.data}, base.tokenizer)
            return prepared

        def fits(entries: Sequence[QueuedJob]) -> bool:
            return agree(ranks, lambda: budget.for_jobs(*zip(*((each.config, each.data) for each in entries))))

        state_file = StateFile(commands, queue, self.summary)
        handler = CommandHandler(
            commands,
            queue,
            self.config,
            prepare=prepare,
            fits=fits,
            changed=self.write_settings,
            show=state_file.write,
            report=report,
            due=commands_of_first_rank(commands, ranks),
        )
        desync_check = AdapterDesyncCheck(self.engine)

        def before_step(iteration: int) -> None:
            desync_check.before_step(iteration)
            handler.carry_out(iteration)

        queue.before_step, queue.make_entry = before_step, handler.make_entry
        report.watching.append(state_file)
        return state_file
