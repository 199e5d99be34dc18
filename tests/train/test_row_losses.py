"""The loss of each held-out row, by what the engine gives for that row alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import CHOSEN, REJECTED
from lowrank.objectives.orpo import ORPOConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.train.micro_batching import units
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.tiny_models import make_base, make_engine, random_step


@pytest.mark.parametrize("kind", ["rows", "pairs"])
@pytest.mark.parametrize("micro_batch_tokens", [20, 10_000])
def test_rows_are_as_each_alone(kind: str, micro_batch_tokens: int) -> None:
    engine, (a, b) = make_engine(make_base("llama"), *[LoraConfig(rank=2)] * 2, micro_batch_tokens=micro_batch_tokens)
    objective = SFTConfig() if kind == "rows" else ORPOConfig()
    engine.remove(b)
    engine.add(b, objective.build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    held_out = random_step(5, [7, 12, 5, 9])
    if kind == "pairs":
        roles = [CHOSEN, REJECTED] * 2
        held_out = [replace(each, pair=n // 2, role=roles[n]) for n, each in enumerate(held_out)]
    found = engine.evaluate({a: random_step(1, [4]), b: held_out}, by_row=[b])
    assert found[a].rows is None
    rows = found[b].rows
    assert rows is not None
    assert sum(rows.shares) == pytest.approx(found[b].loss, abs=1e-9)
    alone = [engine.evaluate({b: unit})[b].loss for unit in units(held_out)]
    assert len(rows.shares) == len(alone) == (4 if kind == "rows" else 2)
    total = sum(rows.counts)
    if kind == "rows":
        assert [share * total / count for share, count in zip(rows.shares, rows.counts)] == pytest.approx(
            alone, abs=1e-9
        )
    else:
        assert rows.counts == (1.0, 1.0)
