"""Every objective, adapter variant and optimizer, and generation with pages, on tensors that say cuda:0."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import lowrank.generate.generator as generator_module
from lowrank.adapters import linear
from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT
from lowrank.errors import ConfigError
from lowrank.generate.request import GenerationConfig
from lowrank.generate.sampler import Prompt, generate
from lowrank.kernels import decode_lora
from lowrank.objectives.sft import SFTConfig
from lowrank.settings import configs_in
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.objectives.test_contract import step_for
from tests.rehearsal.fake_gpu import on_gpu
from tests.rehearsal.test_steps import DTYPES, LENGTHS, STORAGES, base_of, engine_of, unlisted
from tests.tiny_models import VOCABULARY, random_step

OBJECTIVES = configs_in("lowrank.objectives")
VARIANTS = configs_in("lowrank.adapters.variants")
OPTIMIZERS = configs_in("lowrank.train.optimizers")


OF_OTHERS = {"adafactor": {"train/update.py:update cpu to cuda": "transformers' code"}}
"""Optimizers of other libraries that wait, which only those can change."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name: str) -> None:
    base = base_of(STORAGES["dense"](), torch.bfloat16)
    with on_gpu():
        engine = engine_of(base, [LoraConfig(rank=4)])
        engine.add(0, OBJECTIVES[name]().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    with on_gpu() as watch:
        engine.forward_backward({0: step_for(engine.jobs[0].objective, 0)})
        engine.optim_step(0, 1e-3)
    assert not unlisted(watch.found, 1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_every_variant(name: str, storage: str) -> None:
    """Each adapter in the company of a plain one."""
    if name == "loftq":
        pytest.skip("it reads the original weights from a checkpoint, once, before it trains")
    base = base_of(STORAGES[storage](), torch.bfloat16)
    small: Any = {"rank": 4} if "rank" in VARIANTS[name].model_fields else {}
    with on_gpu():
        engine = engine_of(base, [VARIANTS[name](**small), LoraConfig(rank=4)])
    with on_gpu() as watch:
        engine.forward_backward({slot: random_step(slot, LENGTHS, VOCABULARY) for slot in engine.jobs})
        for slot in engine.jobs:
            engine.optim_step(slot, 1e-3)
    assert not unlisted(watch.found, len(engine.jobs))


@pytest.mark.parametrize("tuning", ["adapter", "full"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str, tuning: str) -> None:
    settings: Any = OPTIMIZERS[name]()
    if tuning == "adapter" and settings.not_for_adapters:
        pytest.skip(settings.not_for_adapters)
    if "8bit" in name or "paged" in name:
        pytest.skip("its kernels are bitsandbytes' own, which look for the card")
    base = base_of(STORAGES["dense"](), torch.bfloat16)
    base.model.requires_grad_(tuning == "full")
    with on_gpu():
        engine = Engine(base, Bank(base), 4096)
        slot = BASE_SLOT if tuning == "full" else engine.bank.add(LoraConfig(rank=4), seed=0)
        try:
            engine.add(slot, SFTConfig().build(), settings, seed=0, neftune_alpha=0.0, num_steps=10)
        except ConfigError as error:
            pytest.skip(str(error))
    with on_gpu() as watch:
        for seed in range(2):
            engine.forward_backward({slot: random_step(seed, LENGTHS, VOCABULARY)})
            engine.optim_step(slot, 1e-3)
    found = {place: times for place, times in watch.found.items() if place not in OF_OTHERS.get(name, {})}
    assert not unlisted(Counter(found), 1, steps=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_answers_with_pages(storage: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions and answers of the bare base and of two adapters in the same steps, greedy and drawn."""
    monkeypatch.setattr(generator_module, "known_kv_cache_mismatch", lambda base: None)  # it compares numbers
    launched: list[int] = []
    add = decode_lora.add_updates_of_rows
    monkeypatch.setattr(linear, "add_updates_of_rows", lambda *given: launched.append(len(given[0])) or add(*given))
    base = base_of(STORAGES[storage](), DTYPES[dtype])
    with on_gpu() as watch:
        engine = engine_of(base, [LoraConfig(rank=8), LoraConfig(rank=4)])
        prompts = [Prompt(np.arange(5 + index, 30 + 9 * index), index % 3 - 1) for index in range(5)]
        for given in ({}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}):
            sampling = GenerationConfig(max_new_tokens=4, **given)
            answers = generate(base, engine.bank, prompts, sampling, stop_tokens=frozenset())
            assert [len(answer) for answer in answers] == [4] * 5
    drawing = {place: times for place, times in watch.found.items() if place.startswith("generate/sampling.py")}
    assert drawing.keys() == {"generate/sampling.py:choose reads a list"}, "once a step, of all rows"
    assert drawing.popitem()[1] <= 2 * 5, "eight steps of answers, two that read questions"
    assert bool(launched) == (DTYPES[dtype] != torch.float32), "Triton's kernel for the adapters of answers"
