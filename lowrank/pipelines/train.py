"""The main path, top to bottom: configuration -> data -> base -> adapters -> engine -> loop -> result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lowrank.models.loading.pretrained as loading
from lowrank.adapters.bank import Bank
from lowrank.checkpoints.atomic import write_text
from lowrank.checkpoints.live_commands import CommandQueue
from lowrank.checkpoints.own_tokens import learn_tokens
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.checkpoints.run_folder import STOP, RunFolder
from lowrank.checkpoints.run_state import RunCheckpoint, load_checkpoint
from lowrank.checkpoints.settings_changes import refuse_changed_settings
from lowrank.config import JobConfig, RunConfig, steps_of
from lowrank.config.code import refuse_code
from lowrank.data.batching.dataloader import StreamingDataLoader
from lowrank.data.chat.chosen_template import chosen_templates
from lowrank.data.prepare import Prepared
from lowrank.errors import explain_disk_full
from lowrank.evaluate.metrics import check_installed
from lowrank.models.base import Base
from lowrank.models.config import ModelConfig
from lowrank.models.loading.kind import check_weights
from lowrank.models.placement import Placement
from lowrank.pipelines.adapter_desync import AdapterDesyncCheck
from lowrank.pipelines.artifacts import with_adapters_found
from lowrank.pipelines.job_data import prepare_all, report_data_findings
from lowrank.pipelines.job_queue import JobQueue
from lowrank.pipelines.job_setup import check_steps, check_tokens
from lowrank.pipelines.jobs_in_effect import LIVE, as_begun, commands_in, in_effect, live_state
from lowrank.pipelines.live_commands import CommandHandler, StateFile
from lowrank.pipelines.memory_plan import MemoryBudget, at_once, refuse_too_many, tokens_of
from lowrank.pipelines.pictures import attach_media_encoder, expect_media
from lowrank.pipelines.queued_job import QueuedJob
from lowrank.pipelines.rank_agreement import (
    commands_of_first_rank,
    refuse_rank_differences,
    with_agreed_date,
    with_agreed_plan,
)
from lowrank.pipelines.rank_output import checkpointer_class, open_rank_folder, rank_notifier, stop_signal_of
from lowrank.pipelines.rank_placement import choose_lanes, choose_placement
from lowrank.pipelines.references import check_references
from lowrank.pipelines.slot_allocator import SlotAllocator
from lowrank.pipelines.sweeps import add_search, check_sweep, finish_sweep, record_sweep
from lowrank.ranks import ALONE, Ranks, agree
from lowrank.records import KIND_NAMES
from lowrank.report.events import Event, JobStarted, Notice, Reporter, RunFinished, RunStarted, Stage
from lowrank.report.page import DATA_REPORT, REPORT, write_report
from lowrank.report.reporters import recorders_for
from lowrank.report.summary import SummaryBuilder
from lowrank.third_party import code_allowed
from lowrank.train.checkpointer import Checkpointer
from lowrank.train.engine import Engine
from lowrank.train.listeners import Listeners
from lowrank.train.loop import Loop
from lowrank.train.out_of_memory import explain_out_of_memory
from lowrank.train.router_loss import expert_numbers


def train(
    config: RunConfig,
    *,
    reporters: Sequence[Reporter] = (),
    strict: bool = False,
    allow_code: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train every job of `config` at once on one base; what stands in summary.json.

    Everything that can be checked without the model's weights is checked before they load. Raises the
    errors of lowrank.errors. Ctrl-C, SIGTERM, SIGHUP and a file `stop` in the run folder save a checkpoint and return
    with `"interrupted": True`; before the first step they raise KeyboardInterrupt, since there is nothing to save.
    `reporters` hear the run besides metrics.jsonl and what `report_to` names. `allow_code`: code that is not ours and
    that the settings name may run (third_party.py). `ranks`: the processes that train it together, each of which calls
    this; only the first writes and reports (pipelines/rank_output.py).
    """
    stop_signal = stop_signal_of(ranks, Path(config.output_dir) / STOP)
    with ExitStack() as stack, explain_disk_full(), code_allowed(allow_code), stop_signal:
        stop_signal.raise_if_requested()
        refuse_code(config, "the settings")
        config = with_adapters_found(config)
        report = _listeners(stack, config, reporters, ranks)
        folder = open_rank_folder(stack, config, ranks)
        stop_signal.delete_stale_file()
        checkpoint = load_checkpoint(folder.checkpoint) if folder.checkpoint else None
        state = checkpoint.state if checkpoint else None
        live, before = live_state(state), state["settings"] if state else None
        given, config = config, _as_begun(config, state, ranks)
        lanes = choose_lanes(config, before, ranks, report)
        begun, config = config, in_effect(given, config, state)
        for note in folder.notes:
            report(Notice(note))

        tokenizer, data = read_jobs(config, report, strict)
        stop_signal.raise_if_requested()
        refuse_too_many(config, data)
        refuse_rank_differences(config, data, ranks, lambda text: report(Notice(text, level="warning")))
        report(Stage("planning the memory"))
        config, plan = with_agreed_plan(config, data, before, report, live["capacity"] if live else None, lanes)
        begun = begun.model_copy(update={"model": config.model})  # as it was decided, for whoever goes on

        placement = choose_placement(config, ranks, report)
        base = _load(config, tokenizer, data, report, placement)
        stop_signal.raise_if_requested()
        report(Stage("preparing the jobs"))
        engine = Engine(base, Bank(base), tokens_of(config))
        engine.lanes = lanes
        engine.notify = rank_notifier(ranks, lambda text: report(Notice(text, level="warning")))
        summary = SummaryBuilder(folder.path, state["summary"] if state else None, plan.as_dict() if plan else None)
        chosen = chosen_templates({job.name: job.data for job in config.jobs}, tokenizer)
        ranks.begin(base.device)
        checkpointer = checkpointer_class(ranks)(
            engine, folder.path, config.save_total_limit, lambda: _state(begun, engine, summary, queue), chosen
        )
        entries = [QueuedJob(job, own) for job, own in zip(config.jobs, data)]
        queue = JobQueue(
            SlotAllocator(engine, config, tokenizer, report), checkpointer, entries, report, at_once(config)
        )
        sweep = add_search(queue, config, live)
        queue.allocate_slots(live)
        stop_signal.raise_if_requested()

        # Now, since what is refused above leaves nothing behind that would stand in the way of the next attempt,
        # and takes nothing away.
        folder.clear()
        _write_settings(folder, config, entries)
        report.keeping.append(summary)
        tick = _restore(checkpointer, checkpoint, queue, report)
        known = commands_in(live)
        _accept_commands(stack, folder, config, queue, MemoryBudget(config, plan), report, summary, known)
        started = [queue.started(name) for name in queue.entries]
        report(_run_started(base, config, started))

        save_every = steps_of(config.save_steps, max(job.num_steps for job in started))
        loop = Loop(engine, queue, checkpointer, report, save_every=save_every, tick=tick, stop_signal=stop_signal)
        if sweep is not None:
            queue.on_decision = lambda: record_sweep(sweep, folder.path)
        with explain_out_of_memory("training"):
            done = loop.run()
        _describe_feature_cache(base, report)
        if sweep is not None:
            summary.winner = finish_sweep(sweep, folder.path, report)
        if ranks.rank:
            return summary.as_dict(not done)
        return _finish(summary, report, folder.path, interrupted=not done)


def _restore(checkpointer: Checkpointer, checkpoint: RunCheckpoint | None, queue: JobQueue, report: Listeners) -> int:
    """The tick at which training goes on: that of the checkpoint, or 0."""
    tick = checkpointer.restore(checkpoint, queue.jobs, queue.parked_names()) if checkpoint else 0
    for problem in checkpointer.incompatibilities(queue.jobs):
        report(Notice(problem, level="warning"))
    return tick


def _describe_feature_cache(base: Base, report: Listeners) -> None:
    if base.media_encoder is not None and base.media_encoder.feature_cache is not None:
        report(Notice(base.media_encoder.feature_cache.describe()))


def _finish(summary: SummaryBuilder, report: Listeners, folder: Path, *, interrupted: bool) -> dict[str, Any]:
    """The result first; then pictures and pages of it, which may fail."""
    result = summary.finish(interrupted)
    if summary.plot_problem:
        report(Notice(summary.plot_problem, level="warning"))
    try:
        write_report(folder)
    except Exception as error:  # templates, a full disk: the run is whole without
        report(Notice(f"{REPORT} could not be written ({type(error).__name__}: {error})", level="warning"))
    report(RunFinished(result, interrupted))
    return result


def _as_begun(config: RunConfig, state: Mapping[str, Any] | None, ranks: Ranks) -> RunConfig:
    """With the day on which the run began. OutputError where a run goes on with other settings than it began with."""
    if state is None:
        return with_agreed_date(config, None, ranks)
    config = as_begun(with_agreed_date(config, state["settings"], ranks), state)
    refuse_changed_settings(state["settings"], config.model_dump(mode="json"))
    return config


def read_jobs(config: RunConfig, report: Callable[[Event], None], strict: bool) -> tuple[Any, list[Prepared]]:
    """The tokenizer, and every job's data, with what there is to say about them."""
    check_sweep(config)
    check_installed(sorted({job.eval_metric for job in config.jobs} - {"loss"}))
    report(Notice("reading the data"))
    report(Stage("reading the data"))
    tokenizer = loading.load_tokenizer(config.model)
    starts = {path: Path(path) for job in config.jobs if (path := getattr(job.adapter, "path", None)) is not None}
    for notice in learn_tokens(tokenizer, starts):
        report(Notice(notice))
    check_tokens(config.jobs, tokenizer)
    check_references(config.jobs, tokenizer)
    data = prepare_all(config.jobs, config.model, tokenizer, report, strict)
    report_data_findings(report, config.jobs, data)
    check_steps(config.jobs, data)
    if config.model.random_init is None:
        check_weights(loading.locate(config.model.path))
    return tokenizer, data


def _load(
    config: RunConfig, tokenizer: Any, data: Sequence[Prepared], report: Listeners, placement: Placement | None
) -> Base:
    report(Notice(f"loading {config.model.path}"))
    report(Stage(f"loading {config.model.path}"))
    first = config.jobs[0]
    base = loading.load(
        config.model,
        tokenizer=tokenizer,
        train_all=first.trains_base,
        freeze=first.freeze if first.tuning == "freeze" else None,
        notify=lambda text: report(Notice(text)),
        placement=placement,
    )
    _attach_media_encoder(base, config.model, data, report)
    base.router_aux_loss_coef = config.model.router_aux_loss_coef
    if base.router_aux_loss_coef is not None:
        expert_numbers(base)  # refused now rather than in the first step
    return base


def _attach_media_encoder(
    base: Base, model: ModelConfig, data: Sequence[Prepared], report: Listeners, *, running: bool = False
) -> None:
    attach = partial(
        attach_media_encoder,
        base,
        model.attention,
        lambda text: report(Notice(text)),
        cache_features=model.cache_vision_features,
    )
    kinds = [kind for kind in KIND_NAMES if any(kind in each.media_kinds for each in data)]
    if kinds:
        attach(kinds=kinds, running=running)
    streams = [each.train for each in data if isinstance(each.train, StreamingDataLoader)]
    if streams:
        expect_media(base, streams, attach, lambda text: report(Notice(text, level="warning")))


def _write_settings(folder: RunFolder, config: RunConfig, entries: Sequence[QueuedJob]) -> None:
    """What the run was asked, with the jobs that it has now, and what the doctor found."""
    folder.own(entry.name for entry in entries)
    config = config.model_copy(update={"jobs": tuple(entry.config for entry in entries)})
    settings = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    write_text(folder.path / RUN_CONFIG, settings + "\n")
    found = {entry.name: entry.data.report.to_json() for entry in entries}
    write_text(folder.path / DATA_REPORT, json.dumps(found, ensure_ascii=False) + "\n")


def _accept_commands(
    stack: ExitStack,
    folder: RunFolder,
    config: RunConfig,
    queue: JobQueue,
    budget: MemoryBudget,
    report: Listeners,
    summary: SummaryBuilder,
    known: Sequence[int],
) -> None:
    """From now on the run takes commands, and writes what its jobs do. `known`: commands that are in the checkpoint."""
    ranks = queue.allocator.engine.lanes.ranks
    command_queue = CommandQueue(folder.path, known)
    command_queue.open()
    queue.command_queue = command_queue
    base, read = queue.allocator.engine.base, {}
    tokenizer = base.tokenizer

    def prepare(job: JobConfig) -> Prepared:
        (own,) = prepare_all([job], config.model, tokenizer, report, strict=False, read=read)
        _attach_media_encoder(base, config.model, [own], report, running=True)
        queue.checkpointer.chat_templates |= chosen_templates({job.name: job.data}, tokenizer)
        return own

    watching = StateFile(command_queue, queue, summary)
    handler = CommandHandler(
        command_queue,
        queue,
        config,
        prepare=prepare,
        fits=lambda entries: agree(
            ranks, lambda: budget.for_jobs(*zip(*((each.config, each.data) for each in entries)))
        ),
        changed=lambda: _write_settings(folder, config, list(queue.entries.values())),
        show=watching.write,
        report=report,
        due=commands_of_first_rank(command_queue, ranks),
    )

    desync_check = AdapterDesyncCheck(queue.allocator.engine)

    def before_step(tick: int) -> None:
        desync_check.before_step(tick)
        handler.carry_out(tick)

    queue.before_step, queue.make_entry = before_step, handler.make_entry
    report.watching.append(watching)
    stack.callback(_close, watching)


def _state(config: RunConfig, engine: Engine, summary: SummaryBuilder, queue: JobQueue) -> dict[str, Any]:
    """What a checkpoint holds of the run as a whole."""
    decided = {"micro_batch_tokens": engine.micro_batch_tokens, "lanes": engine.lanes.count}
    settings = {**config.model_dump(mode="json"), **decided}
    return {"settings": settings, "summary": summary.state(), LIVE: queue.state()}


def _run_started(base: Base, config: RunConfig, jobs: Sequence[JobStarted]) -> RunStarted:
    dtype = str(base.dtype).removeprefix("torch.")
    settings = config.model_dump(mode="json")
    return RunStarted(config.output_dir, tuple(jobs), settings, str(base.device), dtype)


def _listeners(stack: ExitStack, config: RunConfig, reporters: Sequence[Reporter], ranks: Ranks) -> Listeners:
    if ranks.rank:
        return Listeners([])
    metrics, *watching = [*recorders_for(config.output_dir, config.report_to), *reporters]
    for reporter in (metrics, *watching):
        stack.callback(_close, reporter)
    return Listeners([metrics], watching)


def _close(reporter: Reporter) -> None:
    with suppress(Exception):  # what it had to keep is kept; a tracker that cannot say goodbye ends no run
        reporter.close()
