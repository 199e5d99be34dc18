"""What a run grows by as its steps meet numbers of rows that no product was compiled for yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.planning.compiled import _BYTES, growth
from lowrank.planning.simulation import PlannedJob
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.products import Products
from tests.tiny_models import make_base, make_engine, random_step


def job(rank: int, tokens: Sequence[int]) -> PlannedJob:
    adapter: Any = LoraConfig(rank=rank)
    optimizer: Any = AdamWConfig()
    return PlannedJob(adapter, SFTConfig().build(), optimizer, [], tokens_of_steps=tokens)


def test_steps_of_one_length_add_nothing() -> None:
    assert growth([job(8, [300] * 10)], 4096) == 0
    assert growth([job(8, [300, 310, 320])], 4096) == 0  # all of 320 rows
    assert growth([job(8, [])], 4096) == 0


def test_every_other_number_of_rows_adds_its_products() -> None:
    one = growth([job(8, [300, 400])], 4096)
    assert one == _BYTES * 25
    assert growth([job(8, [300, 400]), job(8, [400, 300])], 4096) == _BYTES * 15  # together always 700
    assert growth([job(8, [300, 400]), job(4, [300, 300])], 4096) == one
    assert growth([job(8, [300, 4096 + 300])], 4096) == 0  # a full pass, and one of 300
    assert growth([job(8, range(32, 100_000, 32))], 200_000) == _BYTES * 1024


def test_the_count_is_about_right() -> None:
    """Against the products that steps really ask for."""
    engine, (slot,) = make_engine(make_base("llama", torch.bfloat16), LoraConfig(rank=4))
    tokens, counts = [50, 100, 150, 200, 250], []
    products = Products()
    for number in tokens:
        with products:
            engine.forward_backward({slot: random_step(0, [50] * (number // 50))})
        counts.append(len(products.seen))
    found = growth([job(4, tokens)], 4096) / _BYTES
    assert 0.6 * (counts[-1] - counts[0]) < found < 1.7 * (counts[-1] - counts[0]), (counts, found)
