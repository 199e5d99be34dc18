"""One optimizer step of every storage, dtype, kind of job and recompute policy, on tensors that say cuda:0."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.dora import DoraConfig
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.kernels import grouped
from lowrank.models.attention import packed
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checkpointing.memory_efficient_modules import use_memory_efficient_modules
from lowrank.models.checks.isolation import choose_layout
from lowrank.models.loading.quantize_on_load import linears_to_pack
from lowrank.models.storages import StorageConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.settings import configs_in
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.rehearsal.fake_gpu import move, on_gpu
from tests.tiny_models import VOCABULARY, make_model, random_step

STORAGES = configs_in("lowrank.models.storages")
JOBS = {
    "one": [LoraConfig(rank=8)],
    "eight": [LoraConfig(rank=8)] * 8,
    "ranks": [LoraConfig(rank=rank) for rank in (4, 8, 16, 3, 8, 8, 32, 1)],
    "dropout": [LoraConfig(rank=8, dropout=0.1)] * 6,
    "dora": [DoraConfig(rank=8), DoraConfig(rank=4)],
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POLICIES = ("none", "selective", "full", "sqrt", "offload")
LENGTHS = [40, 7, 50, 24]

MAY_WAIT: dict[str, tuple[int, int, str]] = {
    "train/step_metrics.py:read_scalars reads a list": (1, 0, "losses and metrics of all jobs, for the report"),
    "train/update.py:update reads a number": (0, 1, "its gradient's norm decides how the step is taken"),
    "objectives/kto.py:KTO.observe reads a number": (0, 2, "sums over mismatched answers, in every loss of the step"),
    "objectives/kto.py:KTO.observe indexes with booleans": (0, 1, "the same"),
}
"""Who may wait for the device, how often in a step and for each job in it, and why."""


def unlisted(waits: Counter[str], jobs: int, steps: int = 1) -> dict[str, int]:
    """Who waits without being on the list, or more often than it says."""
    allowed = {place: steps * (step + jobs * job) for place, (step, job, _) in MAY_WAIT.items()}
    return {place: times for place, times in waits.items() if times > allowed.get(place, 0)}


def base_of(storage: StorageConfig, dtype: torch.dtype, family: str = "llama") -> Base:
    """A tiny random model, packed on the processor and moved."""
    model = make_model(family, dtype, hidden_size=64, intermediate_size=96, max_position_embeddings=512)
    if storage.type != "dense":
        for name, linear in linears_to_pack(model, storage).items():
            model.set_submodule(name, storage.wrap(linear))
    use_memory_efficient_modules(model)
    base = Base(model, None, family)
    choose_layout(base, "auto")
    move(model)
    return base


def engine_of(base: Base, adapters: list[Any], optimizer: Any = None) -> Engine:
    engine = Engine(base, Bank(base), 4096)
    for seed, adapter in enumerate(adapters):
        slot = engine.bank.add(adapter, seed=seed)
        engine.add(slot, SFTConfig().build(), optimizer or AdamWConfig(), seed=seed, neftune_alpha=5.0 * (seed == 1))
    return engine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("jobs", JOBS)
def test_a_step(storage: str, dtype: str, jobs: str) -> None:
    """Under every recompute policy; whoever waits for the device is on the list."""
    base = base_of(STORAGES[storage](), DTYPES[dtype])
    with on_gpu():
        engine = engine_of(base, JOBS[jobs])
    assert grouped._MANY < 6
    for policy in POLICIES:
        with on_gpu() as watch:
            set_activation_checkpointing(base.model, policy)
            engine.forward_backward({slot: random_step(slot, LENGTHS, VOCABULARY) for slot in engine.jobs})
            gradients = [p.grad for job in engine.jobs.values() for p in job.parameters.values()]
            assert all(grad is not None and grad.is_cuda for grad in gradients)
            for slot in engine.jobs:
                assert not engine.optim_step(slot, 1e-3).skipped
        assert not unlisted(watch.found, len(engine.jobs)), policy


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "fp16"), ((8, 6), "bf16"), ((8, 9), "bf16")])
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_a_step_on_older_cards(
    storage: str, capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the variable-length kernel (T4), and without grouped products that run on the card (RTX 30 and 40)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    base = base_of(STORAGES[storage](), DTYPES[dtype])
    for function in ("grouped_mm",) if capability >= (8, 0) else ("grouped_mm", "varlen"):
        if function == "varlen":
            monkeypatch.setattr(packed, "_varlen", lambda *_: pytest.fail("the kernel is not for this card"))
        else:
            monkeypatch.setattr(grouped.F, function, lambda *_, **__: pytest.fail("waits for the card in every call"))
    with on_gpu():
        engine = engine_of(base, JOBS["eight"])
    with on_gpu() as watch:
        engine.forward_backward({slot: random_step(slot, LENGTHS, VOCABULARY) for slot in engine.jobs})
        for slot in engine.jobs:
            engine.optim_step(slot, 1e-3)
    assert not unlisted(watch.found, len(engine.jobs))
