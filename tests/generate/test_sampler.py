"""Each row of a mixed batch answers as transformers' `generate` does with that adapter merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.generate.generator import Generator
from lowrank.generate.sampler import GenerationConfig, Prompt, generate
from lowrank.train.engine import Engine
from tests.tiny_models import FAMILIES, make_base, make_engine, make_model, random_step

STOP = frozenset({2})


def merged(family: str, engine: Engine, slot: int, dtype: torch.dtype) -> torch.nn.Module:
    model = make_model(family, dtype)
    if slot >= 0:
        for name, layer in engine.bank.slots[slot].layers.items():
            module = model.get_submodule(name)
            turned = type(module).__name__ == "Conv1D"
            weight_OD = module.weight.data.t() if turned else module.weight.data
            merged_OD = layer.variant.merge(weight_OD, layer.scale, layer.masters)
            module.weight.data = (merged_OD.t().contiguous() if turned else merged_OD).to(dtype)
    return model


FIXED = {"bloom", "falcon", "mpt", "stablelm", "jamba"}
"""Families whose cache is not ours; transformers' `generate` answers them, in fixed batches."""


@pytest.mark.filterwarnings("ignore:.*attention mask.*")
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_equals_merged_models(family: str) -> None:
    # transformers' masks of these two overflow in float64 under left padding
    dtype = torch.float32 if family in ("bloom", "mpt") else torch.float64
    excluded = ("gate_proj", "up_proj", "down_proj") if family == "deepseek_v3" else ()
    loras = [LoraConfig(rank=rank, alpha=8, exclude_modules=excluded) for rank in (4, 2)]
    engine, slots = make_engine(make_base(family, dtype), *loras)
    assert (Generator(engine.base, engine.bank).notice is None) == (family not in FIXED)
    for step in range(3):
        engine.forward_backward({slot: random_step(step + slot, [20, 9]) for slot in slots})
        for slot in slots:
            engine.optim_step(slot, 0.1)
    generator = np.random.default_rng(0)
    prompts = [Prompt(generator.integers(3, 97, 3 + 2 * i), (*slots, -1)[i % 3]) for i in range(7)]
    answers = generate(
        engine.base, engine.bank, prompts, GenerationConfig(max_new_tokens=8), stop_tokens=STOP, rows_at_once=4
    )
    for prompt, answer in zip(prompts, answers):
        model = merged(family, engine, prompt.slot, dtype)
        token_1L = torch.from_numpy(prompt.token_L)[None]
        expected = model.generate(
            input_ids=token_1L,
            attention_mask=torch.ones_like(token_1L),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )[0, token_1L.shape[1] :].tolist()
        assert answer == (expected[: expected.index(2)] if 2 in expected else expected)
    assert len({tuple(answer) for answer in answers}) > 1


def test_streams_and_training_goes_on_afterwards() -> None:
    engine, (slot,) = make_engine(make_base("llama"), LoraConfig(rank=4))
    received: list[int] = []
    prompt = Prompt(np.arange(3, 9), slot)
    (answer,) = generate(
        engine.base,
        engine.bank,
        [prompt],
        GenerationConfig(max_new_tokens=5),
        stop_tokens=STOP,
        on_token=received.append,
    )
    assert answer == [token for token in received if token not in STOP]
    assert engine.base.model.config._attn_implementation == "lowrank_packed"
    assert engine.forward_backward({slot: random_step(0, [12])})[slot].loss > 0


def test_seed_makes_draws_repeatable() -> None:
    engine, _ = make_engine(make_base("llama"), LoraConfig(rank=4))
    config = GenerationConfig(max_new_tokens=12, temperature=1.5, seed=3)
    one, two = (generate(engine.base, engine.bank, [Prompt(np.arange(3, 9))], config, stop_tokens=STOP) for _ in "ab")
    assert one == two
