"""The main path, top to bottom: configuration -> data -> base -> adapters -> engine -> loop -> result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lowrank.models.loading as loading
from lowrank.adapters.bank import Bank
from lowrank.checkpoints.atomic import write_text
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.checkpoints.run_folder import RunFolder, open_run_folder
from lowrank.checkpoints.run_state import Checkpoint, load_checkpoint
from lowrank.checkpoints.settings_changes import refuse_changed_settings
from lowrank.config import JobConfig, RunConfig, steps_of
from lowrank.data.prepare import Prepared
from lowrank.evaluate.metrics import check_installed
from lowrank.kernels.host_memory import keep_freed_memory
from lowrank.models.base import Base
from lowrank.planned import tokens_of, with_plan
from lowrank.prepared import prepare_all, tell_about_data, with_date
from lowrank.report.page import DATA_REPORT, write_report
from lowrank.started import check_steps, check_tokens, let_jobs_answer, refer_to_base, start_job
from lowrank.train.engine import Engine
from lowrank.train.events import Event, JobStarted, Notice, Reporter, RunFinished, RunStarted
from lowrank.train.job import Job
from lowrank.train.keeper import DiskKeeper
from lowrank.train.loop import Loop
from lowrank.train.out_of_memory import in_plain_words
from lowrank.train.reporters import recorders_for
from lowrank.train.summary import SummaryBuilder


def train(config: RunConfig, *, reporters: Sequence[Reporter] = (), strict: bool = False) -> dict[str, Any]:
    """Train every job of `config` at once on one base; what stands in summary.json.

    Everything that can be checked without the model's weights is checked before they load. Raises the
    errors of lowrank.errors. Ctrl-C saves a checkpoint and returns with `"interrupted": True`. `reporters` hear the
    run besides metrics.jsonl and what `report_to` names.
    """
    keep_freed_memory()
    with ExitStack() as stack:
        report = _to_all(stack, [*recorders_for(config.output_dir, config.report_to), *reporters])
        folder = stack.enter_context(_folder_of(config))
        checkpoint = load_checkpoint(folder.checkpoint) if folder.checkpoint else None
        config = _as_begun(config, checkpoint)
        for note in folder.notes:
            report(Notice(note))

        tokenizer, data = _read(config, report, strict)
        config, plan = with_plan(config, data, checkpoint.state["settings"] if checkpoint else None, report)

        base = _load(config, tokenizer, report)
        engine = Engine(base, Bank(base), tokens_of(config))
        engine.notify = lambda text: report(Notice(text, level="warning"))
        jobs = [start_job(engine, job, own, config, report) for job, own in zip(config.jobs, data)]
        let_jobs_answer(engine, jobs, data, config, tokenizer)
        refer_to_base(engine, jobs, data, report)  # before the base can change, be it by a checkpoint

        # Now, since what is refused above leaves nothing behind that would stand in the way of the next attempt,
        # and takes nothing away.
        folder.clear()
        _write_beginning(folder.path, config, data)
        summary = SummaryBuilder(
            folder.path, checkpoint.state["summary"] if checkpoint else None, plan.as_dict() if plan else None
        )
        report.listeners.append(summary)
        keeper = DiskKeeper(engine, folder.path, config.save_total_limit, lambda: _state(config, engine, summary))
        tick = keeper.restore(checkpoint, jobs) if checkpoint else 0
        for trouble in keeper.troubles(jobs):
            report(Notice(trouble, level="warning"))
        report(_run_started(base, engine, config, jobs))

        save_every = steps_of(config.save_steps, max(job.num_steps for job in jobs))
        with in_plain_words("training"):
            done = Loop(engine, jobs, keeper, report, save_every=save_every, tick=tick).run()
        result = summary.finish(interrupted=not done)
        write_report(folder.path)
        report(RunFinished(result, interrupted=not done))
        return result


def _folder_of(config: RunConfig) -> RunFolder:
    names = [job.name for job in config.jobs]
    return open_run_folder(config.output_dir, jobs=names, resume=config.resume, overwrite=config.overwrite)


def _as_begun(config: RunConfig, checkpoint: Checkpoint | None) -> RunConfig:
    """With the day on which the run began. OutputError where a run goes on with other settings than it began with."""
    if checkpoint is None:
        return with_date(config, None)
    config = with_date(config, checkpoint.state["settings"])
    refuse_changed_settings(checkpoint.state["settings"], config.model_dump(mode="json"))
    return config


def _read(config: RunConfig, report: _Report, strict: bool) -> tuple[Any, list[Prepared]]:
    """The tokenizer, and every job's data, with what there is to say about them."""
    check_installed(sorted({job.eval_metric for job in config.jobs} - {"loss"}))
    report(Notice("reading the data"))
    tokenizer = loading.load_tokenizer(config.model)
    check_tokens(config.jobs, tokenizer)
    data = prepare_all(config.jobs, tokenizer, report, strict)
    tell_about_data(report, config.jobs, data)
    check_steps(config.jobs, data)
    return tokenizer, data


def _load(config: RunConfig, tokenizer: Any, report: _Report) -> Base:
    report(Notice(f"loading {config.model.path}"))
    first = config.jobs[0]
    return loading.load(
        config.model,
        tokenizer=tokenizer,
        train_all=first.trains_base,
        freeze=first.freeze if first.tuning == "freeze" else None,
        notify=lambda text: report(Notice(text)),
    )


def _write_beginning(folder: Path, config: RunConfig, data: Sequence[Prepared]) -> None:
    """What the run was asked, and what the doctor found."""
    settings = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    write_text(folder / RUN_CONFIG, settings + "\n")
    found = {job.name: own.report.to_json() for job, own in zip(config.jobs, data)}
    write_text(folder / DATA_REPORT, json.dumps(found, ensure_ascii=False) + "\n")


def _state(config: RunConfig, engine: Engine, summary: SummaryBuilder) -> dict[str, Any]:
    """What a checkpoint holds of the run as a whole."""
    settings = {**config.model_dump(mode="json"), "micro_batch_tokens": engine.micro_batch_tokens}
    return {"settings": settings, "summary": summary.state()}


def _run_started(base: Base, engine: Engine, config: RunConfig, jobs: Sequence[Job]) -> RunStarted:
    started = [
        JobStarted(
            name=job.name,
            num_steps=job.num_steps,
            first_step=job.progress.step,
            num_epochs=own.num_train_epochs,
            num_trainable=sum(each.numel() for each in engine.jobs[job.slot].parameters.values()),
            description=_describe(own),
            finished=job.progress.finished,
        )
        for job, own in zip(jobs, config.jobs)
    ]
    dtype = str(base.dtype).removeprefix("torch.")
    settings = config.model_dump(mode="json")
    return RunStarted(config.output_dir, tuple(started), settings, str(base.device), dtype)


def _describe(job: JobConfig) -> str:
    of_base = {"full": "all parameters", "freeze": "some layers"}
    what = of_base.get(job.tuning) or job.adapter.title
    return f"{what}, lr {job.optimizer.learning_rate:g}"


class _Report:
    """Hands every event to every listener, in order."""

    def __init__(self, listeners: Sequence[Any]) -> None:
        self.listeners = list(listeners)

    def __call__(self, event: Event) -> None:
        for listener in self.listeners:
            listener.report(event)


def _to_all(stack: ExitStack, reporters: Sequence[Reporter]) -> _Report:
    for reporter in reporters:
        stack.callback(reporter.close)
    return _Report(reporters)
