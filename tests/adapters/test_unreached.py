"""Targets that no pass runs are named, on models that have some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lowrank.adapters.bank import Bank
from lowrank.adapters.unreached import num_targets, unreached
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.models.base import Base
from tests.tiny_models import FAMILIES, make_base, make_model


def never_run(model: Any) -> None:
    model.model.next_token_proj = torch.nn.Linear(32, 32, dtype=torch.float64).requires_grad_(False)


def weight_alone(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: F.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("change", "missed"),
    [(never_run, ["model.next_token_proj"]), (weight_alone, ["model.layers.1.mlp.down_proj"])],
)
def test_they_are_named(change: Callable[[Any], None], missed: list[str]) -> None:
    model = make_model("llama")
    change(model)
    base = Base(model, None, "m")
    base.set_layout("packed")
    bank = Bank(base)
    other = bank.add(
        LoraConfig(rank=2, target_modules=("q_proj", "embed_tokens", "lm_head"), modules_to_save=("norm",)), seed=0
    )
    slot = bank.add(LoraConfig(rank=2), seed=1)
    assert unreached(bank, [-1, other, slot]) == {slot: missed}
    assert num_targets(bank.slots[other]) == 2 + 1 + 1 + 5


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3", "deepseek_v3", "lfm2"])
def test_all_of_these_run(family: str) -> None:
    bank = Bank(make_base(family))
    config = LoraConfig(rank=2, target_parameters=("experts.down_proj",) if family == "qwen3_moe" else ())
    assert family in FAMILIES
    missed = unreached(bank, [bank.add(config, seed=0)])
    assert set().union(*missed.values(), ()) == set()


def test_jamba_multiplies_by_a_weight_without_calling_its_layer() -> None:
    bank = Bank(make_base("jamba"))
    slot = bank.add(LoraConfig(rank=2), seed=0)
    assert unreached(bank, [slot]) == {slot: ["model.layers.0.mamba.dt_proj"]}
