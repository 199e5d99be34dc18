"""How fast a run will be: a step of a few layers with random weights is timed, and scaled to all of them.

The layers are those of memory.py: one of each kind, and a second of each kind in turn; the difference is what a layer
costs, and what is left is embedding, head and optimiser.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from lowrank.adapters.bank import Bank
from lowrank.models.base import Base
from lowrank.models.config import Config as ModelConfig
from lowrank.models.depths import DepthRouter, Depths, as_planned
from lowrank.models.lean import make_lean
from lowrank.models.loading import choose_device, choose_dtype
from lowrank.models.quiet import quiet_transformers
from lowrank.models.recompute import set_recompute
from lowrank.models.streaming import pack_in_place
from lowrank.planning.layers import keep_layers
from lowrank.planning.memory import StepMemory
from lowrank.planning.plan import Plan
from lowrank.planning.simulation import train_what_is_trained
from lowrank.records import BARE_BASE, Segment, number_the_step
from lowrank.train.cut import Work
from lowrank.train.engine import Engine

_TOKENS = 1024
"""Tokens of the timed step: enough for the hardware to be as fast as it gets, few enough for a short wait."""
_ROUNDS = 3


@dataclass(frozen=True)
class Speed:
    """What was timed, and what it means for the run."""

    tokens_per_second: float
    timed_tokens: int
    timed_layers: int


def calibrate(memory: StepMemory, plan: Plan) -> Speed:
    """Time optimiser steps on the device that computes. Takes seconds, and the memory of a few layers."""
    work = _some(memory.work)
    tokens = sum(len(segment) for segments in work.values() for segment in segments)
    core, more = memory.cores()
    seconds = first = _time(memory, plan, work, core)
    for kind, layers in more.items():
        seconds += (memory.kinds.count(kind) - 1) * max(0.0, _time(memory, plan, work, layers) - first)
    return Speed(tokens / seconds, tokens, memory.num_layers if core is None else len(core))


def _some(work: Work) -> Work:
    """The first segments of every slot, about `_TOKENS` together."""
    each = max(1, _TOKENS // len(work))
    chosen: dict[int, Sequence[Segment]] = {}
    for slot, segments in work.items():
        taken, tokens = [], 0
        for segment in segments:
            if taken and tokens + len(segment) > each:
                break
            taken.append(segment)
            tokens += len(segment)
        chosen[slot] = number_the_step(taken)
    return chosen


def _time(memory: StepMemory, plan: Plan, work: Work, core: tuple[int, ...] | None) -> float:
    """Seconds of one optimiser step of all jobs; the fastest of some."""
    engine = _engine(memory, plan, core)
    best = float("inf")
    rates = {slot: job.settings.learning_rate for slot, job in engine.jobs.items()}
    for _ in range(_ROUNDS + 1):  # the first compiles kernels
        started = time.perf_counter()
        engine.forward_backward(work, rates)
        for slot, rate in rates.items():
            engine.optim_step(slot, rate)
        best = min(best, time.perf_counter() - started)
    return best


def _engine(memory: StepMemory, plan: Plan, core: tuple[int, ...] | None) -> Engine:
    model, routed = _random_model(memory.model, memory.config, core)
    train_what_is_trained(model, memory.jobs)
    pack_in_place(model, memory.model.storage)
    base = Base(model, None, memory.model.path, memory.model.revision)
    base.depths = routed
    base.settle(memory.layout)
    set_recompute(model, plan.recompute)
    engine = Engine(base, Bank(base), plan.micro_batch_tokens)
    for seed, job in enumerate(memory.jobs):
        slot = BARE_BASE if job.adapter is None else engine.bank.add(job.adapter, seed=seed)
        engine.add(slot, job.objective, job.optimizer, seed, job.neftune_alpha)
    return engine


def _random_model(settings: ModelConfig, config: Any, core: tuple[int, ...] | None) -> tuple[Any, Depths | None]:
    device = choose_device(settings)
    with quiet_transformers(), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=choose_dtype(settings, device), trust_remote_code=settings.trust_remote_code
        )
    routed = as_planned(model, settings)
    if core is not None:
        keep_layers(model, core)
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
        for module in model.modules():
            if isinstance(module, DepthRouter):
                module.draw(0)
    model.eval()
    if settings.lean:
        make_lean(model)
    return model, routed
