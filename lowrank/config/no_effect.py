"""Settings that have no effect beside others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowrank.config.checks import is_set, place_of
from lowrank.third_party import code_is_allowed
from lowrank.train.schedule import SCHEDULES_WITH

if TYPE_CHECKING:
    from lowrank.config.schema import JobConfig, RunConfig

_NOT_OF_A_FOLDER = ("path", "dropout", "loraplus_lr_ratio", "loraplus_lr_embedding")
"""Settings of an adapter that hold beside adapter.path."""


def unused(config: RunConfig) -> list[str]:
    """Settings that were set, to something else than the default, but that nothing will read, one line each."""
    found: dict[str, None] = {}
    for index, job in enumerate(config.jobs):
        for problem in _unused_in_job(config, job):
            found[f"{place_of(config, index)}{problem}"] = None
    group = config.model.shift_attn
    if group is not None and all(job.data.max_length <= group // 2 for job in config.jobs):
        found[f"model.shift_attn: {group} has no effect: no document is longer than half of a group"] = None
    if config.model.trust_remote_code and not code_is_allowed():
        found["model.trust_remote_code has no effect without --allow-code: the model's own code stays off"] = None
    if config.save_steps is None and is_set(config, "save_total_limit"):
        found["save_total_limit has no effect without save_steps"] = None
    return list(found)


def _unused_in_job(config: RunConfig, job: JobConfig) -> Iterator[str]:
    if job.tuning != "freeze" and is_set(job, "freeze"):
        yield "freeze has no effect without tuning: freeze"
    data, schedule = job.data, job.schedule
    if job.max_steps is not None and is_set(job, "num_train_epochs"):
        yield "num_train_epochs has no effect, since max_steps is set"
    if data.batch_tokens is not None and is_set(data, "batch_size"):
        yield "data.batch_size has no effect, since data.batch_tokens is set"
    if data.eval and data.validation_split > 0:
        yield "data.validation_split has no effect, since data.eval is set"
    if data.mix == "concat" and any(is_set(source, "weight") for source in (*data.train, *data.eval)):
        yield "data: weights of datasets have no effect with mix: concat; set data.mix: interleave"
    if job.eval_metric == "loss":
        for name in ("eval_generate_samples", "eval_max_new_tokens"):
            if is_set(job, name):
                yield f"{name} has no effect with eval_metric: loss"
    for name, types in SCHEDULES_WITH.items():
        if schedule.type not in types and is_set(schedule, name):
            yield f"schedule.{name} has no effect with type: {schedule.type}"
    if job.max_steps is not None and schedule.warmup_steps >= job.max_steps:
        yield f"schedule.warmup_steps: a warmup of {schedule.warmup_steps} outlasts the job's {job.max_steps} steps"
    yield from _unused_in_adapter(job)


def _unused_in_adapter(job: JobConfig) -> Iterator[str]:
    adapter = job.adapter
    names = [name for name in type(adapter).model_fields if name != "type" and is_set(adapter, name)]
    if job.trains_base and names:
        yield f"adapter.{', adapter.'.join(names)} has no effect with tuning: {job.tuning}"
        return
    for name in adapter.unused:
        if adapter.path is None and is_set(adapter, name):
            yield f"adapter.{name} has no effect with type: {adapter.type}"
    if adapter.loraplus_lr_ratio is None and is_set(adapter, "loraplus_lr_embedding"):
        yield "adapter.loraplus_lr_embedding has no effect without adapter.loraplus_lr_ratio"
    if adapter.path is not None:
        of_folder = [name for name in names if name not in _NOT_OF_A_FOLDER]
        if of_folder:
            yield f"adapter.{', adapter.'.join(of_folder)} has no effect: the adapter in adapter.path decides"
