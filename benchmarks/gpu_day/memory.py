"""Memory: what the plan says beside what is measured, and the longest document that trains on a card of 24 GB."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.gpu_day.cells import LEARNING_RATE, RANK
from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.device import ran_out
from benchmarks.gpu_day.shapes import STORAGES, bank_of, base_of, config_of, make_model
from benchmarks.gpu_day.training import free
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.config import ModelConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.planning.simulation import PlannedJob, Simulation
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig

CARD = 24 << 30
POINTS = (
    ("0.5B", "dense", 4096, "none"),
    ("Llama-3.1-8B", "nf4", 4096, "selective"),
    ("Llama-3.1-8B", "nf4", 4096, "full"),
)


def plans(day: Day) -> None:
    """Predicted and measured bytes of one step."""
    for shape, storage, tokens, policy in POINTS[: day.cells]:
        if day.over():
            return day.note("no time for more plans")
        tokens = min(tokens, 64) if day.tiny else tokens
        predicted = planned(day, shape, storage, tokens, policy)
        free()
        day.device.forget_peak()
        base = base_of(make_model(shape, day.device, day.tiny, day.dtype), shape, storage)
        day.device.forget_peak()  # not what packing took
        train_once(base, tokens, policy)
        measured = day.device.peak()
        day.add(
            "plans",
            {"shape": shape, "storage": storage, "tokens": tokens, "recompute": policy, "predicted": predicted,
             "measured": measured, "error": measured and predicted / measured - 1.0},
        )  # fmt: skip
        del base
        free()
    return None


def planned(day: Day, shape: str, storage: str, tokens: int, policy: str) -> int:
    """What the planner counts (planning/simulation.py)."""
    name = str(day.dtype).removeprefix("torch.")
    settings: Any = {"path": shape, "device": day.device.name, "dtype": name, "storage": STORAGES[storage]()}
    job = PlannedJob(LoraConfig(rank=RANK), SFTConfig().build(), AdamWConfig(), step_of(tokens))
    simulation = Simulation(ModelConfig(**settings), config_of(shape, day.tiny), [job], None)
    (heaviest,) = simulation.heaviest_batches({0: job.step}, tokens)  # one document is one pass
    trace = simulation.step(heaviest, policy)
    return trace.base + trace.adapters + trace.optimizer + max(trace.forward, trace.loss, trace.backward)


def longest(day: Day) -> None:
    """Doubled until memory runs out, then once between."""
    shape = "Llama-3.1-8B"
    base = base_of(make_model(shape, day.device, day.tiny, day.dtype), shape, "nf4")
    policies = ("full", "offload") if day.device.is_gpu else ("full",)
    for policy in policies:
        reached, failed, tokens = 0, None, 32 if day.tiny else 8192
        with day.device.with_memory(CARD) as capped:
            while not day.over() and failed is None and tokens <= (64 if day.tiny else 262_144):
                try:
                    train_once(base, tokens, policy)
                    reached, tokens = tokens, 2 * tokens
                except (RuntimeError, ModelError) as error:
                    if not ran_out(error):
                        raise
                    failed = tokens
                free()
            if failed is not None and not day.over():
                between = (reached + failed) // 2
                try:
                    train_once(base, between, policy)
                    reached = between
                except (RuntimeError, ModelError) as error:
                    if not ran_out(error):
                        raise
        day.add(
            "longest",
            {"shape": shape, "storage": "nf4", "recompute": policy, "tokens": reached, "does_not_fit": failed,
             "memory": CARD if capped else None},
        )  # fmt: skip


def step_of(tokens: int) -> list[Segment]:
    """One document."""
    weight_L = np.ones(tokens, np.float32)
    weight_L[0] = 0.0
    return number_the_step([Segment(np.full(tokens, 5), weight_L)])


def train_once(base: Base, tokens: int, policy: str) -> None:
    """One optimizer step of one adapter."""
    set_activation_checkpointing(base.model, policy)
    engine = Engine(base, bank_of(base), tokens)
    slot = engine.bank.add(LoraConfig(rank=RANK), seed=0)
    try:
        engine.add(slot, SFTConfig().build(), AdamWConfig(), 0, 0.0)
        engine.forward_backward({slot: step_of(tokens)})
        assert not engine.optim_step(slot, LEARNING_RATE).skipped
    finally:
        set_activation_checkpointing(base.model, "none")
