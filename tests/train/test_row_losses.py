"""The loss of each held-out row, by what the engine gives for that row alone."""

from __future__ import annotations

import os
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.objectives.orpo import ORPOConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import CHOSEN, REJECTED
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
    assert sum(rows.loss_terms) == pytest.approx(found[b].loss, abs=1e-9)
    alone = [engine.evaluate({b: unit})[b].loss for unit in units(held_out)]
    assert len(rows.loss_terms) == len(alone) == (4 if kind == "rows" else 2)
    total = sum(rows.counts)
    if kind == "rows":
        assert [term * total / count for term, count in zip(rows.loss_terms, rows.counts)] == pytest.approx(
            alone, abs=1e-9
        )
    else:
        assert rows.counts == (1.0, 1.0)


class Reads(TorchDispatchMode):
    """Which files of ours read a number from a tensor: on a GPU each waits for all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            files = [
                frame.filename for frame in traceback.extract_stack() if f"{os.sep}lowrank{os.sep}" in frame.filename
            ]
            self.found.add(Path(files[-1]).name)
        return func(*args, **(kwargs or {}))


def test_losses_are_read_together() -> None:
    """Not in every pass: a GPU would stand still between two."""
    engine, slots = make_engine(make_base("llama"), *[LoraConfig(rank=2)] * 3, micro_batch_tokens=20)
    with Reads() as reads:
        engine.evaluate({slot: random_step(slot, [17, 12]) for slot in slots}, by_row=slots[:1])
    assert "sft.py" in reads.found, "it counts tokens, on the host"
    assert not reads.found & {"scoring.py", "row_losses.py"}
