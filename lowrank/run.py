"""The main path, top to bottom: configuration -> data -> base -> adapters -> engine -> loop -> result."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import lowrank.models.loading as loading
from lowrank.adapters.bank import Bank
from lowrank.checkpoints.atomic import write_text
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.checkpoints.run_folder import open_run_folder
from lowrank.checkpoints.run_state import load_checkpoint
from lowrank.checkpoints.settings_changes import refuse_changed_settings
from lowrank.checkpoints.value_head import read_value_head
from lowrank.config import JobConfig, RunConfig, steps_of
from lowrank.data.prepare import Prepared, prepare
from lowrank.data.rendering import Renderer
from lowrank.errors import ModelError
from lowrank.evaluate.held_out_answers import HeldOutAnswers, answers_of
from lowrank.evaluate.metrics import check_installed
from lowrank.kernels.host_memory import keep_freed_memory
from lowrank.models.base import Base
from lowrank.models.storages.dense import Config as Dense
from lowrank.objectives import needs
from lowrank.planned import tokens_of, with_plan
from lowrank.records import BARE_BASE
from lowrank.report.page import DATA_REPORT, write_report
from lowrank.train.engine import Engine
from lowrank.train.events import Event, JobStarted, Notice, Preparing, Reporter, RunFinished, RunStarted
from lowrank.train.job import Job
from lowrank.train.keeper import DiskKeeper
from lowrank.train.loop import Loop
from lowrank.train.out_of_memory import in_plain_words
from lowrank.train.reference import ReferencedSteps, References, references_folder
from lowrank.train.reporters import recorders_for
from lowrank.train.rollouts import Answering, Prompts, RewardModel, Rollouts, steps_on_one_batch
from lowrank.train.summary import SummaryBuilder

SECONDS_BETWEEN_WORDS = 5.0
"""Between two words about how far something long has come."""


def train(config: RunConfig, *, reporters: Sequence[Reporter] = (), strict: bool = False) -> dict[str, Any]:
    """Train every job of `config` at once on one base; what stands in summary.json.

    Everything that can be checked without the model's weights is checked before they load. Raises the
    errors of lowrank.errors. Ctrl-C saves a checkpoint and returns with `"interrupted": True`. `reporters` hear the
    run besides metrics.jsonl and what `report_to` names.
    """
    keep_freed_memory()
    with ExitStack() as stack:
        report = _to_all(stack, [*recorders_for(config.output_dir, config.report_to), *reporters])
        folder = stack.enter_context(
            open_run_folder(
                config.output_dir,
                jobs=[job.name for job in config.jobs],
                resume=config.resume,
                overwrite=config.overwrite,
            )
        )
        checkpoint = load_checkpoint(folder.checkpoint) if folder.checkpoint else None
        config = _with_date(config, checkpoint.state["settings"] if checkpoint else None)
        settings = config.model_dump(mode="json")
        if checkpoint:
            refuse_changed_settings(checkpoint.state["settings"], settings)
        for note in folder.notes:
            report(Notice(note))

        check_installed(sorted({job.eval_metric for job in config.jobs} - {"loss"}))
        report(Notice("reading the data"))
        tokenizer = loading.load_tokenizer(config.model)
        data = prepare_all(config.jobs, tokenizer, report, strict)
        _tell_about_data(report, config.jobs, data)
        config, plan = with_plan(config, data, checkpoint.state["settings"] if checkpoint else None, report)
        settings = config.model_dump(mode="json")
        report(Notice(f"loading {config.model.path}"))
        first = config.jobs[0]
        base = loading.load(
            config.model,
            tokenizer=tokenizer,
            train_all=first.trains_base,
            freeze=first.freeze if first.tuning == "freeze" else None,
            notify=lambda text: report(Notice(text)),
        )
        engine = Engine(base, Bank(base, Dense()), tokens_of(config))
        engine.notify = lambda text: report(Notice(text, level="warning"))
        jobs = [_start(engine, job, own, config, report) for job, own in zip(config.jobs, data)]
        _let_answer(engine, jobs, data, config, tokenizer)
        _refer(engine, jobs, data, report)  # before the base can change, be it by a checkpoint

        # Now, since what is refused above leaves nothing behind that would stand in the way of the next attempt,
        # and takes nothing away.
        folder.clear()
        write_text(folder.path / RUN_CONFIG, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        found = {job.name: own.report.to_json() for job, own in zip(config.jobs, data)}
        write_text(folder.path / DATA_REPORT, json.dumps(found, ensure_ascii=False) + "\n")
        summary = SummaryBuilder(
            folder.path, checkpoint.state["summary"] if checkpoint else None, plan.as_dict() if plan else None
        )
        report.listeners.append(summary)
        keeper = DiskKeeper(
            engine,
            folder.path,
            config.save_total_limit,
            lambda: {
                "settings": {**settings, "micro_batch_tokens": engine.micro_batch_tokens},
                "summary": summary.state(),
            },
        )
        tick = keeper.restore(checkpoint, jobs) if checkpoint else 0
        for trouble in keeper.troubles(jobs):
            report(Notice(trouble, level="warning"))
        report(_run_started(base, engine, config, jobs, settings))
        save_every = steps_of(config.save_steps, max(job.num_steps for job in jobs))
        with in_plain_words("training"):
            done = Loop(engine, jobs, keeper, report, save_every=save_every, tick=tick).run()
        result = summary.finish(interrupted=not done)
        write_report(folder.path)
        report(RunFinished(result, interrupted=not done))
        return result


def _with_date(config: RunConfig, settings: dict[str, Any] | None) -> RunConfig:
    """The same with the day on which the run began, so that templates that write the date say the same when it goes on.

    `settings`: those of the checkpoint, if the run goes on.
    """
    began = [job["data"].get("chat_template_date") for job in settings["jobs"]] if settings else []
    today = date.fromisoformat(began[0]) if began and began[0] else date.today()
    jobs = tuple(
        job.model_copy(update={"data": job.data.model_copy(update={"chat_template_date": today})})
        if job.data.chat_template_date is None
        else job
        for job in config.jobs
    )
    return config.model_copy(update={"jobs": jobs})


def prepare_all(
    jobs: Sequence[JobConfig], tokenizer: Any, report: Callable[[Event], None], strict: bool
) -> list[Prepared]:
    """The data of every job; jobs that ask for the same share what was read and tokenised, each with its own feed."""
    done: dict[str, Prepared] = {}
    prepared = []
    for job in jobs:
        objective = job.objective.build()
        mismatched = needs(objective, "mismatched")
        key = f"{objective.record.__qualname__} {mismatched} {job.seed} {job.data.model_dump_json()}"
        own = done.get(key)
        if own is None or job.data.streaming:
            own = done[key] = _prepare(job, tokenizer, report, strict)
        else:
            own = own.again()
        prepared.append(own)
    return prepared


def _prepare(job: JobConfig, tokenizer: Any, report: Callable[[Event], None], strict: bool) -> Prepared:
    """Rows to segments, with the doctor's report; before any weights load."""
    data = job.data.model_copy(update={"strict": job.data.strict or strict})

    def warn(text: str) -> None:
        report(Notice(text, level="warning", job=job.name))

    objective = job.objective.build()
    return prepare(
        data,
        tokenizer=tokenizer,
        record=objective.record,
        seed=job.seed,
        mismatched=needs(objective, "mismatched"),
        on_notice=warn,
    )


def _tell_about_data(report: Callable[[Event], None], jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> None:
    """What the doctor found, each thing once, with the jobs it concerns unless it concerns all."""
    concerned: dict[tuple[str, str], list[str]] = {}
    for job, own in zip(jobs, data):
        for level, texts in (("warning", own.report.warnings), ("info", own.report.information)):
            for text in texts:
                concerned.setdefault((level, text), []).append(job.name)
    for (level, text), names in concerned.items():
        if 1 < len(names) < len(jobs):
            text = f"{', '.join(names)}: {text}"
        report(Notice(text, level=level, job=names[0] if len(names) == 1 < len(jobs) else None))


def _start(engine: Engine, config: JobConfig, data: Prepared, run: RunConfig, report: Callable[[Event], None]) -> Job:
    """The job's adapter on the base (or the base itself), its optimiser, and its place in the loop."""
    if config.trains_base:
        slot = BARE_BASE
    else:
        slot = _attach(engine.bank, config, report)
    engine.add(slot, config.objective.build(), config.optimizer, config.seed, config.neftune_noise_alpha or 0.0)
    if engine.jobs[slot].value_D is not None and config.adapter.path is not None:
        value_D = read_value_head(Path(config.adapter.path))
        if value_D is not None:
            engine.load_value_head(slot, value_D)
    answers = _answers(engine.base, config, data)
    for text in answers.notices if answers else ():
        report(Notice(text, job=config.name))
    per_epoch = (data.train.steps_per_epoch or 0) * steps_on_one_batch(engine.jobs[slot].objective)
    num_steps = config.max_steps or math.ceil(config.num_train_epochs * per_epoch - 1e-9)
    return Job(
        name=config.name,
        slot=slot,
        feed=data.train,
        held_out=data.eval,
        schedule=config.schedule,
        learning_rate=config.optimizer.learning_rate,
        num_steps=num_steps,
        eval_every=steps_of(run.eval_steps, num_steps),
        log_every=steps_of(run.logging_steps, num_steps) or num_steps,
        max_skipped_steps=config.optimizer.max_skipped_steps,
        patience=config.early_stopping_patience,
        answers=answers,
    )


def _answers(base: Base, config: JobConfig, data: Prepared) -> HeldOutAnswers | None:
    """The held-out questions that the job is asked; None where the loss decides."""
    if config.eval_metric == "loss":
        return None
    return answers_of(
        data.eval,
        base.tokenizer,
        Renderer(base.tokenizer, config.data).stop_tokens,
        metric=config.eval_metric,
        samples=config.eval_generate_samples,
        max_new_tokens=config.eval_max_new_tokens,
        reach=base.reach,
    )


def _attach(bank: Bank, config: JobConfig, report: Callable[[Event], None]) -> int:
    """A fresh adapter, or the one that `adapter.path` names, in a slot of the bank."""
    if config.adapter.path is None:
        slot = bank.add(config.adapter, seed=config.seed)
    else:
        saved = load_adapter(Path(config.adapter.path))
        slot = bank.add(saved.config, seed=config.seed)
        bank.load(slot, saved.tensors)
    if bank.slots[slot].missed:
        report(Notice(bank.slots[slot].missed or "", level="warning", job=config.name))
    return slot


def _refer(engine: Engine, jobs: Sequence[Job], data: Sequence[Prepared], report: Callable[[Event], None]) -> None:
    """Give every job that compares with the bare base its log-probabilities, computed once for all of them."""
    comparing = [(job, own) for job, own in zip(jobs, data) if needs(engine.jobs[job.slot].objective, "reference")]
    if not comparing:
        return
    references = References(engine, references_folder())
    told = time.monotonic()

    def progress(done: int, total: int, seconds_left: float) -> None:
        nonlocal told
        if done < total and time.monotonic() - told > SECONDS_BETWEEN_WORDS:
            told = time.monotonic()
            report(Preparing("reference log-probabilities", done, total, seconds_left))

    samples = [sample for _, own in comparing for sample in (*own.train.samples, own.eval)]
    references.prepare((segment for sample in samples for segment in sample), progress)
    report(
        Notice(
            f"reference log-probabilities under the bare base: {references.num_computed} segments computed, "
            f"{references.num_found} found in {references_folder()}"
        )
    )
    if references.trouble:
        report(Notice(references.trouble, level="warning"))
    for job, own in comparing:
        job.feed = ReferencedSteps(own.train, references)
        job.held_out = references.attach(own.eval)


def _let_answer(
    engine: Engine, jobs: Sequence[Job], data: Sequence[Prepared], config: RunConfig, tokenizer: Any
) -> None:
    """Give every job that learns from its own answers a feed of them; all jobs are answered together."""
    answering = Answering(engine.base, engine.bank)
    for job, own, settings in zip(jobs, data, config.jobs):
        if needs(engine.jobs[job.slot].objective, "rollouts"):
            known = [*(segment for sample in own.train.samples for segment in sample), *own.eval]
            longest = max(map(len, known)) if own.train.samples else settings.data.max_length
            prompts = Prompts(own.train, own.eval, longest, Renderer(tokenizer, settings.data).stop_tokens)
            judge = _reward_model(engine.bank, engine.jobs[job.slot].objective)
            job.feed = job.rollouts = Rollouts(engine, job.slot, prompts, answering, settings.seed, judge)


def _reward_model(bank: Bank, objective: Any) -> RewardModel | None:
    """The reward model that the objective names, in a slot of its own. ModelError if it is none, or does not fit."""
    path = objective.settings.reward_model
    if path is None:
        return None
    value_D, saved = read_value_head(Path(path)), load_adapter(Path(path))
    if value_D is None:
        raise ModelError(f"objective.reward_model: {path} has no value head; it must come from objective reward")
    slot = bank.add(saved.config, seed=0)
    bank.load(slot, saved.tensors)
    return RewardModel(slot, value_D)


def _run_started(
    base: Base, engine: Engine, config: RunConfig, jobs: Sequence[Job], settings: dict[str, Any]
) -> RunStarted:
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
