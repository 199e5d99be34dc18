"""Reference models: log-probabilities under the bare base or another model, or the logits of a second base."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lowrank.models.loading.pretrained as loading
from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT
from lowrank.checkpoints.base_tensors import on_model
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.config import JobConfig
from lowrank.data.prepare import Prepared
from lowrank.errors import ModelError, raise_all
from lowrank.models.config import ModelConfig
from lowrank.objectives import needs
from lowrank.objectives.dpo import DPOConfig
from lowrank.objectives.kto import KTOConfig
from lowrank.pipelines.artifacts import ModelArtifacts, find_artifacts
from lowrank.report.events import Event, Notice, Preparing
from lowrank.train.engine import Engine
from lowrank.train.job import Job
from lowrank.train.reference import ReferencedSteps, References, references_folder

SECONDS_BETWEEN_NOTICES = 5.0
"""Seconds between two progress events of a long computation."""


def reference_of(job: JobConfig) -> str | None:
    """Return the reference model that a job's objective names; None: the bare base."""
    settings = job.objective
    return settings.reference_model if isinstance(settings, (DPOConfig, KTOConfig)) else None


def check_references(jobs: Sequence[JobConfig], tokenizer: Any) -> None:
    """Check the reference models of the jobs. ModelError for those that do not exist or have another vocabulary."""
    problems = []
    for name in dict.fromkeys(reference_of(job) for job in jobs):
        if name is None:
            continue
        found = _artifacts(name)
        if loading.load_tokenizer(found.model).get_vocab() != tokenizer.get_vocab():
            problems.append(
                f"objective.reference_model: {name} has another vocabulary than the base; name a "
                "model with the same tokenizer"
            )
    raise_all(ModelError, "these reference models cannot be used:", problems)


def load_reference_base(
    engine: Engine, jobs: Sequence[JobConfig], model: ModelConfig, report: Callable[[Event], None]
) -> None:
    """Load a second copy of the base as reference, where a job needs reference logits and trains the base itself."""
    if jobs and jobs[0].trains_base and needs(engine.jobs[BASE_SLOT].objective, "reference_logits"):
        report(Notice("loading the base a second time as the reference model (uses the base's memory a second time)"))
        engine.reference_base = loading.load(model, tokenizer=engine.base.tokenizer)


def compute_references(
    engine: Engine,
    jobs: Sequence[Job],
    data: Sequence[Prepared],
    configs: Sequence[JobConfig],
    model: ModelConfig,
    report: Callable[[Event], None],
) -> None:
    """Attach reference log-probabilities to the data of every job that needs them, computed once per reference model.

    They cover the samples of all steps, also those before a resume (the base may have changed in them), and the
    held-out ones. A named reference model is freed afterwards, unless a stream needs it for rows still to come."""
    comparing = [
        (job, prepared, reference_of(settings))
        for job, prepared, settings in zip(jobs, data, configs)
        if needs(engine.jobs[job.slot].objective, "reference")
    ]
    for name in dict.fromkeys(name for *_, name in comparing):
        references = _references(engine, name, model, report)
        _compute(references, [(job, prepared) for job, prepared, other in comparing if other == name], name, report)


def _artifacts(name: str) -> ModelArtifacts:
    found = find_artifacts(name)
    if len(found.adapters) > 1:
        raise ModelError(
            f"objective.reference_model: {name} holds {len(found.adapters)} adapters; name the folder of one"
        )
    return found


def _references(
    engine: Engine, name: str | None, base_model: ModelConfig, report: Callable[[Event], None]
) -> References:
    if name is None:
        return References(engine, references_folder())
    found = _artifacts(name)
    same = ("dtype", "device", "attention")
    model = found.model.model_copy(update={key: getattr(base_model, key) for key in same})
    report(Notice(f"loading the reference model {name}"))
    base = loading.load(model, tokenizer=engine.base.tokenizer)
    other = Engine(base, Bank(base), engine.micro_batch_tokens, engine.shares_prompts)
    other.lanes = engine.lanes
    slot = BASE_SLOT
    for folder in found.adapters.values():
        saved = on_model(load_adapter(Path(folder)), base.model)
        slot = other.bank.add(saved.config, seed=0)
        other.bank.load(slot, saved.tensors)
    return References(other, references_folder() if slot == BASE_SLOT else None, slot)


def _compute(
    references: References, comparing: Sequence[tuple[Job, Prepared]], name: str | None, report: Callable[[Event], None]
) -> None:
    last_notice = time.monotonic()

    def progress(done: int, total: int, seconds_left: float) -> None:
        nonlocal last_notice
        if done < total and time.monotonic() - last_notice > SECONDS_BETWEEN_NOTICES:
            last_notice = time.monotonic()
            report(Preparing("reference log-probabilities", done, total, seconds_left))

    samples = [
        sample
        for job, prepared in comparing
        for sample in (*prepared.train.samples_of_steps(job.num_steps), prepared.eval)
    ]
    references.prepare((segment for sample in samples for segment in sample), progress)
    report(
        Notice(
            f"reference log-probabilities under {name or 'the bare base'}: {references.num_computed} segments computed,"
            f" {references.num_found} found in {references_folder()}"
        )
    )
    if references.problem:
        report(Notice(references.problem, level="warning"))
    for job, prepared in comparing:
        job.dataloader = ReferencedSteps(prepared.train, references)
        job.held_out = references.attach(prepared.eval)
    if name is not None and all(prepared.train.samples for _, prepared in comparing):
        references.release_model()
