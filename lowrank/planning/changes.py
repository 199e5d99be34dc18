"""Finds single changes of the settings that would make a run fit that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import choose_device, choose_dtype
from lowrank.planning.choose import TOKENS
from lowrank.planning.memory import StepMemory
from lowrank.planning.placed import REPLICATED
from lowrank.planning.plan import MemoryPlan, Planner
from lowrank.planning.simulation import PlannedJob
from lowrank.segments import Segment
from lowrank.settings import configs_in

_LENGTHS = (4096, 2048, 1024, 512, 256, 128)
_COSTS = {"model.storage: bf16": "; a step takes a few percent longer, since each weight is widened as it is used"}
"""What a change takes beside what it saves, where that is not plain from it."""
_RANKS = (64, 32, 16, 8, 4)


def changes_that_fit(planner: Planner, plan: MemoryPlan, settings: Mapping[str, Any]) -> list[str]:
    """Each change by itself, as `setting: value (needs ...)`, the mildest of its kind.

    `settings`: activation_checkpointing, micro_batch_tokens and max_length as they stand.
    """
    found = []
    for kind in (
        _activation_checkpointing(plan, settings),
        _tokens(plan, settings),
        _storage(planner),
        _length(planner, settings),
        _rank(planner),
    ):
        for change_text, change in kind:
            changed = change(planner, plan)
            if changed.fits:
                found.append(
                    f"{change_text} would make it fit (about {changed.peak / 1e9:.1f} GB{_COSTS.get(change_text, '')})"
                )
                break
    return found or [
        "no single change makes it fit: take a smaller base, or several of: full activation checkpointing, shorter "
        "rows, fewer jobs"
    ]


def _activation_checkpointing(plan: MemoryPlan, settings: Mapping[str, Any]) -> Iterator[Any]:
    if settings["activation_checkpointing"] != "auto":
        for policy in ("selective", "full", *(["sqrt"] if settings.get("base", REPLICATED) == REPLICATED else [])):
            yield (
                f"model.activation_checkpointing: {policy}",
                lambda p, plan, policy=policy: p.plan(plan.micro_batch_tokens, policy),
            )


def _tokens(plan: MemoryPlan, settings: Mapping[str, Any]) -> Iterator[Any]:
    if settings["micro_batch_tokens"] != "auto":
        for tokens in (*TOKENS, 512, 256, 128, 64):
            if tokens < plan.micro_batch_tokens:
                yield (
                    f"micro_batch_tokens: {tokens}",
                    lambda p, plan, tokens=tokens: p.plan(tokens, plan.activation_checkpointing),
                )


def _storage(planner: Planner) -> Iterator[Any]:
    model = planner.memory.model
    if model.storage.type != "dense":
        return
    narrower = ("bf16",) if choose_dtype(model, choose_device(model)) == torch.float32 else ()
    for name in (*narrower, "int8", "nf4"):
        config = configs_in("lowrank.models.storages").get(name)
        if config is not None:
            yield f"model.storage: {name}", _with_model(model.model_copy(update={"storage": config(type=name)}))  # pyright: ignore[reportCallIssue]


def _length(planner: Planner, settings: Mapping[str, Any]) -> Iterator[Any]:
    longest = max(len(segment) for job in planner.memory.jobs for segment in job.step)
    for length in _LENGTHS:
        if length < min(longest, settings["max_length"]):
            yield f"data.max_length: {length}", _with_jobs(lambda job, length=length: cut_job(job, length))


def _rank(planner: Planner) -> Iterator[Any]:
    adapters = [job.adapter for job in planner.memory.jobs if job.adapter is not None]
    ranks = [adapter.rank for adapter in adapters if "rank" not in adapter.unused]
    for rank in _RANKS:
        if ranks and rank < max(ranks):
            yield f"adapter.rank: {rank}", _with_jobs(lambda job, rank=rank: _of_rank(job, rank))


def cut_job(job: PlannedJob, length: int) -> PlannedJob:
    """The same with no segment longer than `length`."""
    return dataclasses.replace(job, step=[_cut(each, length) for each in job.step])


def _cut(segment: Segment, length: int) -> Segment:
    media = segment.media
    end = length if media is None else media.whole_until(length)
    shown = media and media.between(0, end)
    return dataclasses.replace(segment, token_L=segment.token_L[:end], weight_L=segment.weight_L[:end], media=shown)


def _of_rank(job: PlannedJob, rank: int) -> PlannedJob:
    if job.adapter is None:
        return job
    return dataclasses.replace(job, adapter=job.adapter.model_copy(update={"rank": min(rank, job.adapter.rank)}))


def _with_jobs(change: Any) -> Any:
    def plan(planner: Planner, plan: MemoryPlan) -> MemoryPlan:
        now = planner.memory
        memory = StepMemory(now.model, [change(job) for job in now.jobs], now.lanes, now.placed)
        return planner.of(memory.model, memory).plan(plan.micro_batch_tokens, plan.activation_checkpointing)

    return plan


def _with_model(model: ModelConfig) -> Any:
    def plan(planner: Planner, plan: MemoryPlan) -> MemoryPlan:
        memory = StepMemory(model, planner.memory.jobs, planner.memory.lanes, planner.memory.placed)
        return planner.of(model, memory).plan(plan.micro_batch_tokens, plan.activation_checkpointing)

    return plan
