"""A run's jobs put in their places: adapters on the base, optimisers, references, feeds of their own answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lowrank.adapters.bank import Bank
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.checkpoints.value_head import read_value_head
from lowrank.config import JobConfig, RunConfig, steps_of
from lowrank.data.feed import Feed
from lowrank.data.prepare import Prepared
from lowrank.data.rendering import Renderer
from lowrank.errors import ConfigError, ModelError, raise_all
from lowrank.evaluate.held_out_answers import HeldOutAnswers, answers_of
from lowrank.models.leak import shares_prompts
from lowrank.objectives import needs
from lowrank.records import BARE_BASE, Preference
from lowrank.train.engine import Engine
from lowrank.train.events import Event, Notice, Preparing
from lowrank.train.first_looks import first_looks
from lowrank.train.job import Job
from lowrank.train.reference import ReferencedSteps, References, references_folder
from lowrank.train.rollouts import Answering, Prompts, RewardModel, Rollouts, steps_on_one_batch

SECONDS_BETWEEN_WORDS = 5.0
"""Between two words about how far something long has come."""


def start_job(
    engine: Engine, config: JobConfig, data: Prepared, run: RunConfig, report: Callable[[Event], None]
) -> Job:
    """The job's adapter on the base (or the base itself), its optimiser, and its place in the loop."""
    if config.trains_base:
        slot = BARE_BASE
    else:
        slot = _attach(engine, config, data, report)
    _check_reach(engine, slot, config, data)
    num_steps, noise = num_steps_of(config, data), config.neftune_noise_alpha or 0.0
    engine.add(slot, config.objective.build(), config.optimizer, config.seed, noise, num_steps)
    objective = engine.jobs[slot].objective
    if (objective.record is Preference or needs(objective, "rollouts")) and not engine.base.shares_prompts:
        plain = engine.base.shift_attn is None and engine.base.depths is None
        engine.base.shares_prompts = plain and shares_prompts(engine.base)
    if engine.jobs[slot].value_D is not None and config.adapter.path is not None:
        value_D = read_value_head(Path(config.adapter.path))
        if value_D is not None:
            engine.load_value_head(slot, value_D)
    answers = _answers(engine.bank, slot, config, data)
    for text in answers.notices if answers else ():
        report(Notice(text, job=config.name))
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


def num_steps_of(config: JobConfig, data: Prepared) -> int:
    """Optimiser steps of the job."""
    in_all = data.train.steps_in(config.num_train_epochs) * steps_on_one_batch(config.objective.build())
    return config.max_steps or math.ceil(in_all - 1e-9)


def check_steps(jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> None:
    """ConfigError for adapters that cannot be trained in as many steps as there are."""
    problems = []
    for job, own in zip(jobs, data):
        trouble = None if job.trains_base else job.adapter.trouble_in(num_steps_of(job, own))
        problems += [f"{job.name}: {trouble}"] if trouble else []
    raise_all(ConfigError, "these jobs are too short for their adapters", problems)


def check_tokens(jobs: Sequence[JobConfig], tokenizer: Any) -> None:
    """ConfigError for tokens that adapters are to learn and that the tokenizer does not know."""
    known = tokenizer.get_vocab()
    problems = [
        f"{job.name}: adapter.trainable_token_indices: {token!r} is no token of this base; `lowrank vocab` adds it"
        for job in jobs
        for token in job.adapter.trainable_token_indices
        if isinstance(token, str) and token not in known and not job.trains_base
    ]
    raise_all(ConfigError, "these tokens cannot be learned", problems)


def _check_reach(engine: Engine, slot: int, config: JobConfig, data: Prepared) -> None:
    """ModelError if virtual tokens push a document out of what the model reads."""
    virtual, reach = engine.bank.num_virtual(slot), engine.bank.reach(slot)
    if not virtual or reach is None:
        return
    known = [len(segment) for sample in (*data.train.samples, data.eval) for segment in sample]
    longest = max(known, default=config.data.max_length)
    if longest > reach:
        raise ModelError(
            f"{config.name}: the longest document has {longest} tokens and {virtual} virtual ones come before it; the "
            f"model reads {reach + virtual}: set data.max_length to {reach}, or fewer num_virtual_tokens"
        )


def _answers(bank: Bank, slot: int, config: JobConfig, data: Prepared) -> HeldOutAnswers | None:
    """The held-out questions that the job is asked; None where the loss decides."""
    if config.eval_metric == "loss":
        return None
    return answers_of(
        data.eval,
        bank.base.tokenizer,
        Renderer(bank.base.tokenizer, config.data).stop_tokens,
        metric=config.eval_metric,
        samples=config.eval_generate_samples,
        max_new_tokens=config.eval_max_new_tokens,
        reach=bank.reach(slot),
    )


def _attach(engine: Engine, config: JobConfig, data: Prepared, report: Callable[[Event], None]) -> int:
    """A fresh adapter, or the one that `adapter.path` names, in a slot of the bank."""
    bank = engine.bank
    if config.adapter.path is None:
        looks = None
        if config.adapter.looks_at_data:
            assert isinstance(data.train, Feed), "checked with the settings"
            report(Notice("looking at the job's data to start from it", job=config.name))
            looks = partial(first_looks, engine, data.train)
        slot = bank.add(config.adapter, seed=config.seed, looks=looks)
    else:
        saved = load_adapter(Path(config.adapter.path))
        slot = bank.add(saved.config, seed=config.seed)
        bank.load(slot, saved.tensors)
    if bank.slots[slot].missed:
        report(Notice(bank.slots[slot].missed or "", level="warning", job=config.name))
    return slot


def refer_to_base(
    engine: Engine, jobs: Sequence[Job], data: Sequence[Prepared], report: Callable[[Event], None]
) -> None:
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


def let_jobs_answer(
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
