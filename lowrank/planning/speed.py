"""How fast a run will be: a step of a few layers with random weights is timed, and scaled to all of them.

The layers are those of memory.py: one of each kind, and a second of each kind in turn; the difference is what a layer
costs, and what is left is embedding, head and optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checkpointing.memory_efficient_modules import use_memory_efficient_modules
from lowrank.models.config import ModelConfig
from lowrank.models.layer_wrappers import LayerWrapper, wrapped_as_planned
from lowrank.models.loading.model_class import model_class
from lowrank.models.loading.pretrained import choose_device, choose_dtype
from lowrank.models.loading.quantize_on_load import pack_in_place
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.media_encoder import MediaEncoder
from lowrank.planning.fusing import StepTime, fitted
from lowrank.planning.layers import keep_layers
from lowrank.planning.memory import StepMemory
from lowrank.planning.plan import MemoryPlan
from lowrank.planning.simulation import kinds_of, train_what_is_trained
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.micro_batching import StepSegments

_TOKENS = 1024
"""Tokens of the timed step: enough for the hardware to be as fast as it gets, few enough for a short wait."""
_ROUNDS = 3


@dataclass(frozen=True)
class Speed:
    """What was timed, and what it means for the run."""

    tokens_per_second: float
    timed_tokens: int
    timed_layers: int
    step: StepTime | None = None
    """Of several jobs: how long steps take, by tokens and jobs (planning/fusing.py)."""


def calibrate(memory: StepMemory, plan: MemoryPlan) -> Speed:
    """Time optimizer steps on the device that computes. Takes seconds, and the memory of a few layers."""
    work = _some(memory.work)
    tokens = _tokens(work)
    timed = [work, *_alone(work)] if len(work) > 1 else [work]
    core, more = memory.cores()
    first = _times(memory, plan, timed, core)
    seconds = list(first)
    for kind, layers in more.items():
        for place, (one, other) in enumerate(zip(_times(memory, plan, timed, layers), first)):
            seconds[place] += (memory.kinds.count(kind) - 1) * max(0.0, one - other)
    step = None
    if len(timed) > 1:
        (few, many), (short, long) = (_tokens(one) for one in timed[1:]), seconds[1:]
        step = fitted((few, short), (many, long), (len(work), tokens, seconds[0]))
    return Speed(tokens / seconds[0], tokens, memory.num_layers if core is None else len(core), step)


def _alone(work: StepSegments) -> list[StepSegments]:
    """One job's part of the work, and as much as fits for it of what all have: both steps of one job alone."""
    slot = max(work, key=lambda each: len(work[each]))
    plain = [segment for own in work.values() for segment in own if segment.pair < 0]
    like = next(iter(work[slot]))
    same = [segment for segment in plain if segment.role == like.role and not segment.signals_L]
    return [{slot: work[slot]}, {slot: number_the_step(same if len(same) > len(work[slot]) else [*work[slot]] * 2)}]


def _tokens(work: StepSegments) -> int:
    return sum(len(segment) for segments in work.values() for segment in segments)


def _some(work: StepSegments) -> StepSegments:
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


def _times(
    memory: StepMemory, plan: MemoryPlan, works: list[StepSegments], core: tuple[int, ...] | None
) -> list[float]:
    """Seconds of one optimizer step of each of these works; the fastest of some, taken in turns."""
    engine = _engine(memory, plan, core)
    best = [float("inf")] * len(works)
    for _ in range(_ROUNDS + 1):  # the first compiles kernels
        for place, work in enumerate(works):
            rates = {slot: engine.jobs[slot].settings.learning_rate for slot in work}
            started = time.perf_counter()
            engine.forward_backward(work, rates)
            for slot, rate in rates.items():
                engine.optim_step(slot, rate)
            best[place] = min(best[place], time.perf_counter() - started)
    return best


def _engine(memory: StepMemory, plan: MemoryPlan, core: tuple[int, ...] | None) -> Engine:
    model, wrapper = _random_model(memory.model, memory.config, core)
    train_what_is_trained(model, memory.jobs)
    pack_in_place(model, memory.model.storage)
    base = Base(model, None, memory.model.path, memory.model.revision)
    base.layer_wrapper = wrapper
    base.set_layout(memory.layout)
    if memory.processor is not None:
        base.media_encoder = MediaEncoder(base, memory.processor, kinds_of(memory.jobs))
    set_activation_checkpointing(model, plan.activation_checkpointing)
    engine = Engine(base, Bank(base), plan.micro_batch_tokens)
    for seed, job in enumerate(memory.jobs):
        slot = BASE_SLOT if job.adapter is None else engine.bank.add(job.adapter, seed=seed)
        engine.add(slot, job.objective, job.optimizer, seed, job.neftune_alpha)
    return engine


def _random_model(settings: ModelConfig, config: Any, core: tuple[int, ...] | None) -> tuple[Any, LayerWrapper | None]:
    device = choose_device(settings)
    with quiet_transformers(), torch.device("meta"):
        model = model_class(config).from_config(
            config, dtype=choose_dtype(settings, device), trust_remote_code=settings.runs_own_code
        )
    wrapper = wrapped_as_planned(model, settings.layer_wrapper)
    if core is not None:
        keep_layers(model, core)
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
        if wrapper is not None:
            wrapper.draw()
    model.eval()
    if settings.memory_efficient_modules:
        use_memory_efficient_modules(model)
    return model, wrapper
