"""Data preparation of all jobs: from files to optimizer steps, before any weights load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import date
from typing import Any

from lowrank.adapters.prompts import PromptSettings
from lowrank.config import JobConfig, RunConfig
from lowrank.data.prepare import Prepared, key_of_rows, prepare
from lowrank.errors import DataError
from lowrank.media.limits import MediaLimits
from lowrank.models.config import ModelConfig
from lowrank.models.positions import can_be_stretched, positions_of
from lowrank.objectives import needs
from lowrank.planning.simulation import read_config
from lowrank.records import KIND_NAMES
from lowrank.report.events import Event, Notice


def with_date(config: RunConfig, settings: dict[str, Any] | None, now: date | None = None) -> RunConfig:
    """Return the settings with the date on which the run began, so that chat templates that write the date write the
    same one after a resume.

    `settings`: those of the checkpoint, if the run goes on. `now`: left out, today.
    """
    began = [job["data"].get("chat_template_date") for job in settings["jobs"]] if settings else []
    today = date.fromisoformat(began[0]) if began and began[0] else now or date.today()
    jobs = tuple(
        job.model_copy(update={"data": job.data.model_copy(update={"chat_template_date": today})})
        if job.data.chat_template_date is None
        else job
        for job in config.jobs
    )
    return config.model_copy(update={"jobs": jobs})


_LENGTH = "data.max_length"
"""What findings and errors about the length of rows name."""
_ON_TOO_LONG = {
    "truncate": "cut at their end",
    "drop": "left out",
    "split": "cut in pieces",
    "error": "refused",
}


def prepare_all(
    jobs: Sequence[JobConfig],
    model: ModelConfig,
    tokenizer: Any,
    report: Callable[[Event], None],
    strict: bool,
    read: dict[str, Prepared] | None = None,
) -> list[Prepared]:
    """Return the data of every job, with no sample longer than the context of `model` (by its config.json). Jobs with
    the same data settings share what was read and tokenized, each with its own dataloader. `read`: data that was read
    before, to which this is added. DataError for rows that cannot be used."""
    shape = read_config(model)
    within = [_within_reach(job, positions_of(shape)) for job in jobs]
    described = [
        None if cut is job else _context_length_notice(job, cut, model.path, shape) for job, cut in zip(jobs, within)
    ]

    def notify_all(texts: Iterable[str | None]) -> None:
        for text in dict.fromkeys(text for text in texts if text):
            report(Notice(text, level="warning"))

    try:
        data = _prepare_jobs(within, tokenizer, report, strict, {} if read is None else read)
    except DataError as error:
        if _LENGTH in str(error):  # the limit that rows are too long for is reported first
            notify_all(described)
        raise
    notify_all(text for text, job, cut, prepared in zip(described, jobs, within, data) if _concerns(job, cut, prepared))
    notify_all(_settings_of_media(jobs, model, data))
    return data


def _settings_of_media(jobs: Sequence[JobConfig], model: ModelConfig, data: Sequence[Prepared]) -> Iterator[str]:
    """Yield notices about media settings that have no effect, since no row has such media."""
    if any(job.data.streaming for job in jobs):  # whose rows are not known yet
        return
    for kind in ("image", "video"):
        if any(kind in each.media_kinds or (each.media_kinds and kind == "video") for each in data):
            continue  # LLaMA-Factory's files set both for models with a vision tower
        for name in (each.name for each in fields(MediaLimits) if each.name.startswith(kind)):
            if getattr(model, name) != type(model).model_fields[name].default:
                yield f"model.{name} has no effect: no row has {KIND_NAMES[kind]}"
    if model.cache_vision_features and not any({"image", "video"} & set(each.media_kinds) for each in data):
        yield "model.cache_vision_features: true has no effect: no row has pictures or videos"
    for job, prepared in zip(jobs, data):
        if job.data.check_pictures != "header" and not prepared.media_kinds:
            yield f"data.check_pictures: {job.data.check_pictures} has no effect: no row has pictures, videos or sounds"


def _within_reach(job: JobConfig, reach: int | None) -> JobConfig:
    if reach is not None and not job.trains_base and isinstance(job.adapter, PromptSettings):
        reach = max(1, reach - job.adapter.num_virtual_tokens)
    data = job.data.within(reach)
    return job if data is job.data else job.model_copy(update={"data": data})


def _concerns(job: JobConfig, cut: JobConfig, prepared: Prepared) -> bool:
    """Return whether the context limit matters: a larger max_length was set, or rows are cut by it."""
    if job.data.max_length != type(job.data).model_fields["max_length"].default or job.data.streaming:
        return True
    segments = (segment for sample in (*prepared.train.samples, prepared.eval) for segment in sample)
    lost = any(_LENGTH in text for text in prepared.report.losses)
    return lost or any(len(segment) >= cut.data.max_length for segment in segments)


def _context_length_notice(job: JobConfig, cut: JobConfig, name: str, shape: Any) -> str:
    text = (
        f"{name} reads {positions_of(shape):,} tokens (its config.json says so) and data.max_length is "
        f"{job.data.max_length:,}: rows of more than {cut.data.max_length:,} are {_ON_TOO_LONG[job.data.on_too_long]}"
    )
    if not can_be_stretched(shape):
        return text
    factor = math.ceil(job.data.max_length / cut.data.max_length)
    return f"{text}. To learn from longer ones, stretch its rotary embedding: model.rope_scaling.factor={factor}"


def _prepare_jobs(
    jobs: Sequence[JobConfig],
    tokenizer: Any,
    report: Callable[[Event], None],
    strict: bool,
    done: dict[str, Prepared],
) -> list[Prepared]:
    data: list[Prepared] = []
    keys = [_key_of_data(job) for job in jobs]
    for job, key in zip(jobs, keys):
        prepared = done.get(key)
        if prepared is None or job.data.streaming:
            try:
                prepared = done[key] = _prepare(job, tokenizer, report, strict)
            except DataError as error:
                names = [each.name for each, other in zip(jobs, keys) if other == key]
                if len(names) == len(jobs):
                    raise
                raise DataError(f"{', '.join(names)}: {error}") from error
        else:
            prepared = prepared.for_another(job.data, job.seed)
        data.append(prepared)
    return data


def _key_of_data(job: JobConfig) -> str:
    """Return a key that is equal for jobs that share what was read and tokenized."""
    objective = job.objective.build()
    mismatched = needs(objective, "mismatched")
    return f"{objective.record.__qualname__} {mismatched} {key_of_rows(job.data, job.seed)}"


def _prepare(job: JobConfig, tokenizer: Any, report: Callable[[Event], None], strict: bool) -> Prepared:
    """Read and tokenize the rows of a job, with a report of problems in them."""
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


def report_data_findings(report: Callable[[Event], None], jobs: Sequence[JobConfig], data: Sequence[Prepared]) -> None:
    """Report problems in the data, each once, with the names of the jobs that have it unless all do."""
    concerned: dict[tuple[str, str], list[str]] = {}
    for job, prepared in zip(jobs, data):
        for level, texts in (("warning", prepared.report.warnings), ("info", prepared.report.information)):
            for text in texts:
                concerned.setdefault((level, text), []).append(job.name)
    for (level, text), names in concerned.items():
        if 1 < len(names) < len(jobs):
            text = f"{', '.join(names)}: {text}"
        report(Notice(text, level=level, job=names[0] if len(names) == 1 < len(jobs) else None))
