"""A run and its data: files to optimiser steps for every job, before any weights load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

from lowrank.config import JobConfig, RunConfig
from lowrank.data.prepare import Prepared, prepare
from lowrank.objectives import needs
from lowrank.train.events import Event, Notice


def with_date(config: RunConfig, settings: dict[str, Any] | None) -> RunConfig:
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


def tell_about_data(report: Callable[[Event], None], jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> None:
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
