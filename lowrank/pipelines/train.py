"""The main path, top to bottom: configuration -> data -> base -> adapters -> engine -> loop -> result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import lowrank.models.loading.pretrained as loading
from lowrank.adapters.bank import Bank
from lowrank.checkpoints.own_tokens import learn_tokens
from lowrank.checkpoints.run_folder import STOP
from lowrank.checkpoints.run_state import load_checkpoint
from lowrank.checkpoints.settings_changes import refuse_changed_settings
from lowrank.config import RunConfig, steps_of
from lowrank.config.code import refuse_code
from lowrank.data.prepare import Prepared
from lowrank.errors import explain_disk_full
from lowrank.evaluate.metrics import check_installed
from lowrank.models.base import Base
from lowrank.models.loading.kind import check_weights
from lowrank.models.placement import Placement
from lowrank.pipelines.active_run import ActiveRun, build_queue
from lowrank.pipelines.artifacts import with_adapters_found
from lowrank.pipelines.job_data import prepare_all, report_data_findings
from lowrank.pipelines.job_queue import JobQueue
from lowrank.pipelines.job_setup import check_reward_functions, check_steps, check_tokens, num_steps_of
from lowrank.pipelines.media import prepare_media
from lowrank.pipelines.memory_plan import MemoryBudget, refuse_too_many, tokens_of
from lowrank.pipelines.rank_agreement import (
    refuse_rank_differences,
    with_agreed_date,
    with_agreed_plan,
)
from lowrank.pipelines.rank_output import open_rank_folder, rank_notifier, stop_signal_of
from lowrank.pipelines.rank_placement import choose_lanes, choose_placement
from lowrank.pipelines.references import check_references
from lowrank.pipelines.saved_run import SavedRun, with_live_changes, without_live_changes
from lowrank.pipelines.sweeps import add_search, check_sweep, finish_sweep, record_sweep
from lowrank.ranks import ALONE, Ranks
from lowrank.report.events import Event, JobStarted, Notice, Reporter, RunFinished, RunStarted, Stage
from lowrank.report.page import REPORT, write_report
from lowrank.report.reporters import recorders_for
from lowrank.report.summary import SummaryBuilder
from lowrank.third_party import code_allowed
from lowrank.train.engine import Engine
from lowrank.train.lanes import Lanes
from lowrank.train.listeners import Listeners
from lowrank.train.loop import Loop
from lowrank.train.out_of_memory import explain_out_of_memory
from lowrank.train.router_loss import expert_numbers
from lowrank.train.schedule import length_notice


def train(
    config: RunConfig,
    *,
    reporters: Sequence[Reporter] = (),
    strict: bool = False,
    allow_code: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train every job of `config` at once on one base. Returns the contents of summary.json.

    Everything that can be checked without the model's weights is checked before they load. Raises the
    errors of lowrank.errors. Ctrl-C, SIGTERM, SIGHUP and a file `stop` in the run folder save a checkpoint and return
    with `"interrupted": True`; before the first step they raise KeyboardInterrupt, since there is nothing to save.

    `reporters` receive the run's events, besides metrics.jsonl and what `report_to` names. `strict`: problems in the
    data are errors. `allow_code`: code that is not ours and that the settings name may run (third_party.py). `ranks`:
    the processes that train the run, each of which calls this; only the first writes and reports
    (pipelines/rank_output.py).
    """
    stop_signal = stop_signal_of(ranks, Path(config.output_dir) / STOP)
    with ExitStack() as stack, explain_disk_full(), code_allowed(allow_code), stop_signal:
        stop_signal.raise_if_requested()
        refuse_code(config, "the settings")
        requested_config = with_adapters_found(config)
        report = _listeners(stack, requested_config, reporters, ranks)
        folder = open_rank_folder(stack, requested_config, ranks)
        stop_signal.delete_stale_file()
        saved = SavedRun(load_checkpoint(folder.checkpoint) if folder.checkpoint else None)
        initial_config = _restore_config(requested_config, saved, ranks)
        lanes = choose_lanes(initial_config, saved.settings, ranks, report)
        effective_config = with_live_changes(requested_config, initial_config, saved)
        for note in folder.notes:
            report(Notice(note))

        tokenizer, data = read_jobs(effective_config, report, strict)
        stop_signal.raise_if_requested()
        refuse_too_many(effective_config, data)
        refuse_rank_differences(effective_config, data, ranks, lambda text: report(Notice(text, level="warning")))
        report(Stage("planning the memory"))
        effective_config, plan = with_agreed_plan(effective_config, data, saved.settings, report, saved.capacity, lanes)
        # a checkpoint has the model's settings as they were decided, so that a resumed run decides nothing anew
        initial_config = initial_config.model_copy(update={"model": effective_config.model})

        placement = choose_placement(effective_config, ranks, report)
        base = _load(effective_config, tokenizer, data, report, placement)
        stop_signal.raise_if_requested()
        report(Stage("preparing the jobs"))
        engine = _build_engine(base, effective_config, lanes, ranks, report)
        summary = SummaryBuilder(folder.path, saved.summary, plan.as_dict() if plan else None)
        queue = build_queue(engine, effective_config, data, folder.path, report, lambda: run.state())
        run = ActiveRun(effective_config, initial_config, folder, queue, summary, report)
        sweep = add_search(queue, effective_config, saved.live)
        queue.allocate_slots(saved.live)
        stop_signal.raise_if_requested()

        # Only now, so that a run that is refused above leaves nothing in the folder and deletes nothing from it.
        folder.clear()
        run.write_settings()
        report.keeping.append(summary)
        iteration = _restore_jobs(queue, saved, report)
        stack.callback(_close, run.accept_commands(saved.commands, MemoryBudget(effective_config, plan)))
        started = [queue.started(name) for name in queue.entries]
        report(_run_started(base, effective_config, started))

        save_every = steps_of(effective_config.save_steps, max(job.num_steps for job in started))
        loop = Loop(
            engine,
            queue,
            queue.checkpointer,
            report,
            save_every=save_every,
            iteration=iteration,
            stop_signal=stop_signal,
        )
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


def _restore_config(requested: RunConfig, saved: SavedRun, ranks: Ranks) -> RunConfig:
    """Return the initial settings, with the date on which the run began. OutputError where a run is resumed with other
    settings than it began with."""
    if saved.settings is None:
        return with_agreed_date(requested, None, ranks)
    initial = without_live_changes(with_agreed_date(requested, saved.settings, ranks), saved)
    refuse_changed_settings(saved.settings, initial.model_dump(mode="json"))
    return initial


def _build_engine(base: Base, config: RunConfig, lanes: Lanes, ranks: Ranks, report: Listeners) -> Engine:
    engine = Engine(base, Bank(base), tokens_of(config))
    engine.lanes = lanes
    engine.notify = rank_notifier(ranks, lambda text: report(Notice(text, level="warning")))
    ranks.begin(base.device)
    return engine


def _restore_jobs(queue: JobQueue, saved: SavedRun, report: Listeners) -> int:
    """Restore all jobs from the checkpoint, if there is one. Returns the iteration at which training starts."""
    checkpointer = queue.checkpointer
    iteration = 0
    if saved.checkpoint is not None:
        iteration = checkpointer.restore(saved.checkpoint, queue.jobs, queue.parked_names())
        for notice in _length_notices(queue, saved):
            report(notice)
    for problem in checkpointer.incompatibilities(queue.jobs):
        report(Notice(problem, level="warning"))
    return iteration


def _length_notices(queue: JobQueue, saved: SavedRun) -> Iterator[Notice]:
    """Yield what a job that goes on should know whose number of steps has changed."""
    for name, entry in queue.entries.items():
        config, progress = entry.config, queue.progress_of(name)
        lengths = {key: saved.job_settings(name).get(key) for key in ("max_steps", "num_train_epochs")}
        if progress.finished or lengths["num_train_epochs"] is None:
            continue
        before = num_steps_of(config.model_copy(update=lengths), entry.data)
        now = num_steps_of(config, entry.data)
        text = length_notice(config.schedule, config.optimizer.learning_rate, progress.step, before, now)
        if text is not None:
            yield Notice(text, level="warning", job=name)


def _describe_feature_cache(base: Base, report: Listeners) -> None:
    if base.media_encoder is not None and base.media_encoder.feature_cache is not None:
        report(Notice(base.media_encoder.feature_cache.describe()))


def _finish(summary: SummaryBuilder, report: Listeners, folder: Path, *, interrupted: bool) -> dict[str, Any]:
    """Write the result, then its plots and pages, which may fail. Returns the result."""
    result = summary.finish(interrupted)
    if summary.plot_problem:
        report(Notice(summary.plot_problem, level="warning"))
    try:
        write_report(folder)
    except Exception as error:  # templates, a full disk: the run is whole without
        report(Notice(f"{REPORT} could not be written ({type(error).__name__}: {error})", level="warning"))
    report(RunFinished(result, interrupted))
    return result


def read_jobs(config: RunConfig, report: Callable[[Event], None], strict: bool) -> tuple[Any, list[Prepared]]:
    """Return the tokenizer and every job's data, in the order of the jobs; report what was found in them."""
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
    check_reward_functions(config.jobs, data)
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
    prepare_media(base, config.model, data, report)
    base.router_aux_loss_coef = config.model.router_aux_loss_coef
    if base.router_aux_loss_coef is not None:
        expert_numbers(base)  # refused now rather than in the first step
    return base


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
    with suppress(Exception):  # its data are written; a tracker that fails to close does not fail the run
        reporter.close()
