"""What jobs compare with: log-probabilities under the bare base or another model, or another model's logits."""

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
"""Between two words about how far something long has come."""


def reference_of(job: JobConfig) -> str | None:
    """The model that a job's objective names to compare with; None: the bare base."""
    settings = job.objective
    return settings.reference_model if isinstance(settings, (DPOConfig, KTOConfig)) else None


def check_references(jobs: Sequence[JobConfig], tokenizer: Any) -> None:
    """ModelError for models to compare with that are not there, or read other tokens."""
    problems = []
    for name in dict.fromkeys(reference_of(job) for job in jobs):
        if name is None:
            continue
        found = _artifacts(name)
        if loading.load_tokenizer(found.model).get_vocab() != tokenizer.get_vocab():
            problems.append(f"objective.reference_model: {name} has other tokens than the base, so they do not compare")
    raise_all(ModelError, "these models cannot be compared with", problems)


def load_reference_base(
    engine: Engine, jobs: Sequence[JobConfig], model: ModelConfig, report: Callable[[Event], None]
) -> None:
    """A second copy of the base, where a job compares with its logits and changes its weights."""
    if jobs and jobs[0].trains_base and needs(engine.jobs[BASE_SLOT].objective, "reference_logits"):
        report(Notice("loading the base a second time, as what the objective compares with; it takes its memory again"))
        engine.reference_base = loading.load(model, tokenizer=engine.base.tokenizer)


def compute_references(
    engine: Engine,
    jobs: Sequence[Job],
    data: Sequence[Prepared],
    configs: Sequence[JobConfig],
    model: ModelConfig,
    report: Callable[[Event], None],
) -> None:
    """Give every job that compares with a model's log-probabilities those, computed once for all that compare with the
    same: of what its steps use from the first to the last, those before a resume included (the base may have changed
    in them), and of what is held out. A model that a job names is loaded for that, and for longer by a stream alone."""
    comparing = [
        (job, own, reference_of(settings))
        for job, own, settings in zip(jobs, data, configs)
        if needs(engine.jobs[job.slot].objective, "reference")
    ]
    for name in dict.fromkeys(name for *_, name in comparing):
        references = _references(engine, name, model, report)
        _compute(references, [(job, own) for job, own, other in comparing if other == name], name, report)


def _artifacts(name: str) -> ModelArtifacts:
    found = find_artifacts(name)
    if len(found.adapters) > 1:
        raise ModelError(
            f"objective.reference_model: {name} holds {len(found.adapters)} adapters; name the folder of one"
        )
    return found


def _references(engine: Engine, name: str | None, own: ModelConfig, report: Callable[[Event], None]) -> References:
    if name is None:
        return References(engine, references_folder())
    found = _artifacts(name)
    same = ("dtype", "device", "attention")
    model = found.model.model_copy(update={key: getattr(own, key) for key in same})
    report(Notice(f"loading {name}, which answers are compared with"))
    base = loading.load(model, tokenizer=engine.base.tokenizer)
    other = Engine(base, Bank(base), engine.micro_batch_tokens, engine.shares_prompts)
    other.lanes = engine.lanes
    slot = BASE_SLOT
    for place in found.adapters.values():
        saved = on_model(load_adapter(Path(place)), base.model)
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

    samples = [sample for job, own in comparing for sample in (*own.train.samples_of_steps(job.num_steps), own.eval)]
    references.prepare((segment for sample in samples for segment in sample), progress)
    report(
        Notice(
            f"reference log-probabilities under {name or 'the bare base'}: {references.num_computed} segments computed,"
            f" {references.num_found} found in {references_folder()}"
        )
    )
    if references.problem:
        report(Notice(references.problem, level="warning"))
    for job, own in comparing:
        job.dataloader = ReferencedSteps(own.train, references)
        job.held_out = references.attach(own.eval)
    if name is not None and all(own.train.samples for _, own in comparing):
        references.forget_model()
