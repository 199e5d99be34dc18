"""Jobs set up: adapters on the base, optimizers, reference log-probabilities, rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lowrank.adapters.bank import Bank
from lowrank.adapters.slot import file_form_problems
from lowrank.adapters.unreached import num_targets, unreached
from lowrank.batches import BASE_SLOT
from lowrank.checkpoints.base_tensors import on_model
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.checkpoints.value_head import read_value_head
from lowrank.config import JobConfig, RunConfig, steps_of
from lowrank.data.batching.dataloader import DataLoader
from lowrank.data.chat.rendering import Renderer
from lowrank.data.prepare import Prepared
from lowrank.errors import ConfigError, ModelError, raise_all
from lowrank.evaluate.held_out_answers import HeldOutAnswers, answers_of
from lowrank.generate.transformers_fallback import image_problem
from lowrank.models.base import Base
from lowrank.models.checks.isolation import shares_prompts
from lowrank.objectives import needs
from lowrank.objectives.rollout import RolloutSettings, reward_function_problems
from lowrank.records import Preference
from lowrank.report.events import Event, Notice
from lowrank.train.calibration_pass import calibration_passes
from lowrank.train.engine import Engine
from lowrank.train.job import Job
from lowrank.train.rollout_generator import RolloutGenerator
from lowrank.train.rollouts import Prompts, RewardModel, Rollouts, steps_on_one_batch


def start_job(
    engine: Engine,
    config: JobConfig,
    data: Prepared,
    run: RunConfig,
    report: Callable[[Event], None],
    slot: int | None = None,
) -> Job:
    """Put a job's adapter on the base, set up its optimizer, and return the job for the loop. `slot`: the slot of a
    resumed job; None: the first free one. With `tuning: full` or `freeze` the base itself is trained."""
    slot = BASE_SLOT if config.trains_base else _attach(engine, config, data, report, slot)
    _check_reach(engine, slot, config, data)
    _check_cached_tower(engine, slot, config)
    num_steps, noise = num_steps_of(config, data), config.neftune_noise_alpha or 0.0
    engine.add(slot, config.objective.build(), config.optimizer, config.seed, noise, num_steps)
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
        dataloader=data.train,
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


def _check_cached_tower(engine: Engine, slot: int, config: JobConfig) -> None:
    """ModelError for an adapter on a vision tower whose features are cached. Which layers an expression, a full name or
    an adapter folder matches is known only on the model; plain settings are refused before (config/checks.py)."""
    media_encoder = engine.base.media_encoder
    cached = media_encoder is not None and media_encoder.feature_cache is not None
    if cached and slot != BASE_SLOT and engine.bank.slots[slot].adapts_tower:
        raise ModelError(
            f"model.cache_vision_features: the adapter of job {config.name} reaches the tower or the projector, whose "
            "features then change with every step; leave cache_vision_features out, or name the language model's "
            "layers alone"
        )


def may_share_prompts(base: Base, jobs: Sequence[JobConfig]) -> bool:
    """Return whether a job has several answers to one prompt, which gain by sharing its computation, and `base` can
    share it, which is tried out on the model."""
    objectives = [job.objective.build() for job in jobs]
    gains = any(each.record is Preference or needs(each, "rollouts") for each in objectives)
    return gains and base.shift_attn is None and base.layer_wrapper is None and shares_prompts(base)


def num_steps_of(config: JobConfig, data: Prepared) -> int:
    """Return the number of optimizer steps of a job."""
    in_all = data.train.steps_in(config.num_train_epochs) * steps_on_one_batch(config.objective.build())
    return config.max_steps or math.ceil(in_all - 1e-9)


def check_steps(jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> None:
    """Check the adapters' own schedules. ConfigError for those that need more steps than the job has."""
    problems = []
    for job, prepared in zip(jobs, data):
        problem = None if job.trains_base else job.adapter.schedule_problem(num_steps_of(job, prepared))
        problems += [f"{job.name}: {problem}"] if problem else []
    raise_all(ConfigError, "these jobs are too short for their adapters:", problems)


def check_reward_functions(jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> None:
    """Check that reward functions require no column that no row has. ConfigError lists those that do; of a stream the
    columns are not known yet."""
    problems: list[str] = []
    for job, prepared in zip(jobs, data):
        if isinstance(job.objective, RolloutSettings) and prepared.train.samples:
            rows = (segment for sample in (*prepared.train.samples, prepared.eval) for segment in sample)
            columns = {name: None for segment in rows if segment.prompted for name in segment.prompted.columns}
            found = reward_function_problems(job.objective.reward_funcs, columns)
            problems += [f"{job.name}: {problem}" if len(jobs) > 1 else problem for problem in found]
    raise_all(ConfigError, "these reward functions cannot be called:", problems)


def check_tokens(jobs: Sequence[JobConfig], tokenizer: Any) -> None:
    """Check `adapter.trainable_token_indices`. ConfigError for tokens that are not in the vocabulary."""
    known = tokenizer.get_vocab()
    problems = [
        f"{job.name}: adapter.trainable_token_indices: {token!r} is not in the vocabulary; `lowrank vocab` adds it"
        for job in jobs
        for token in job.adapter.trainable_token_indices
        if isinstance(token, str) and token not in known and not job.trains_base
    ]
    raise_all(ConfigError, "these tokens cannot be trained:", problems)


def _check_reach(engine: Engine, slot: int, config: JobConfig, data: Prepared) -> None:
    """ModelError if a document with its virtual tokens is longer than the model's context."""
    virtual, reach = engine.bank.num_virtual(slot), engine.bank.max_positions(slot)
    if not virtual or reach is None:
        return
    known = [len(segment) for sample in (*data.train.samples, data.eval) for segment in sample]
    longest = max(known, default=config.data.max_length)
    if longest > reach:
        raise ModelError(
            f"{config.name}: the longest document has {longest} tokens and {virtual} virtual ones come before it; the "
            f"model's maximum context length is {reach + virtual}: set data.max_length to {reach}, or fewer "
            "num_virtual_tokens"
        )


def _answers(bank: Bank, slot: int, config: JobConfig, data: Prepared) -> HeldOutAnswers | None:
    """Return the held-out questions that are answered at evaluations; None where the loss decides."""
    if config.eval_metric == "loss":
        return None
    return answers_of(
        data.eval,
        bank.base.tokenizer,
        Renderer(bank.base.tokenizer, config.data).stop_tokens,
        metric=config.eval_metric,
        samples=config.eval_generate_samples,
        max_new_tokens=config.eval_max_new_tokens,
        reach=bank.max_positions(slot),
        image_problem=image_problem(bank.base),
    )


def _attach(
    engine: Engine, config: JobConfig, data: Prepared, report: Callable[[Event], None], number: int | None
) -> int:
    """Add a new adapter, or the one that `adapter.path` names, to the bank, and return its slot."""
    bank = engine.bank
    if config.adapter.path is None:
        calibration = None
        if config.adapter.needs_calibration:
            assert isinstance(data.train, DataLoader), "checked with the settings"
            report(Notice("running calibration passes on the training data to initialize the adapter", job=config.name))
            calibration = partial(calibration_passes, engine, data.train)
        slot = bank.add(config.adapter, seed=config.seed, calibration=calibration, slot=number)
        problems = file_form_problems(bank.slots[slot])
        if problems:  # found now, not when the first adapter is to be saved
            bank.remove(slot)
        raise_all(
            ModelError,
            f"adapters of adapter.type {config.adapter.type} could not be read from their files; declare what it "
            "trains in its settings' `peft`, or give the form of another variant by `as_saved` and `FileForm.saved` "
            "(docs/add-a-variant.md):",
            problems,
        )
    else:
        saved = on_model(load_adapter(Path(config.adapter.path)), engine.base.model)
        for note in saved.notes:
            report(Notice(note, job=config.name))
        slot = bank.add(saved.config, seed=config.seed, slot=number)
        bank.load(slot, saved.tensors)
    if bank.slots[slot].unmatched_note:
        report(Notice(bank.slots[slot].unmatched_note or "", level="warning", job=config.name))
    return slot


def report_unreached_modules(engine: Engine, jobs: Sequence[Job], report: Callable[[Event], None]) -> None:
    """Report target modules that are never executed for the jobs' data. ModelError for an adapter all of whose modules
    are."""
    missed = unreached(engine.bank, [job.slot for job in jobs])
    problems = []
    for job in jobs:
        names = missed.get(job.slot)
        if not names:
            continue
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        total = num_targets(engine.bank.slots[job.slot])
        text = (
            f"{len(names)} of {total} target modules are never executed for this kind of data, so they get no "
            f"gradient: {shown}"
        )
        if len(names) == total:
            problems.append(f"{job.name}: {text}; choose others in adapter.target_modules")
        else:
            report(Notice(f"{text}. Exclude them with adapter.exclude_modules", level="warning", job=job.name))
    raise_all(ModelError, "these adapters would learn nothing:", problems)


def set_up_rollouts(
    engine: Engine,
    jobs: Sequence[Job],
    data: Sequence[Prepared],
    configs: Sequence[JobConfig],
    tokenizer: Any,
    answering: RolloutGenerator,
) -> None:
    """Give every job that trains on rollouts a dataloader of them. One generator answers for all jobs."""
    for job, prepared, settings in zip(jobs, data, configs):
        if needs(engine.jobs[job.slot].objective, "rollouts"):
            known = [*(segment for sample in prepared.train.samples for segment in sample), *prepared.eval]
            longest = max(map(len, known)) if prepared.train.samples else settings.data.max_length
            prompts = Prompts(prepared.train, prepared.eval, longest, Renderer(tokenizer, settings.data).stop_tokens)
            reward_model = _reward_model(engine.bank, engine.jobs[job.slot].objective)
            job.dataloader = job.rollouts = Rollouts(engine, job.slot, prompts, answering, settings.seed, reward_model)


def _reward_model(bank: Bank, objective: Any) -> RewardModel | None:
    """Load the reward model that the objective names into a slot of its own. ModelError if it has no value head or does
    not fit the base."""
    path = objective.settings.reward_model
    if path is None:
        return None
    value_D, saved = read_value_head(Path(path)), on_model(load_adapter(Path(path)), bank.base.model)
    if value_D is None:
        raise ModelError(f"objective.reward_model: {path} has no value head; it must come from objective reward")
    slot = bank.add(saved.config, seed=0)
    bank.load(slot, saved.tensors)
    return RewardModel(slot, value_D)
