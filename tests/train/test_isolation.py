"""Job A's losses and weights are the same, to rounding, whatever else shares the base."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import Segment
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.tiny_models import FAMILIES, make_base, make_engine, random_step, tiny

A = LoraConfig(rank=4, alpha=8, dropout=0.3)
LENGTHS = [5, 12, 9, 3, 17, 8]
STEPS = 4


def train(
    engine: Engine, slot: int, others: dict[int, Any] | None = None, steps: range = range(STEPS)
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of the job in `slot`, whose data depend on nothing but the step."""
    losses = []
    for step in steps:
        work = {slot: random_step(100 + step, LENGTHS)}
        for other, make in (others or {}).items():
            work[other] = make(step)
        forwarded = engine.forward_backward(work)
        for each in work:
            engine.optim_step(each, 1e-2)
        losses.append(forwarded[slot].loss)
    return losses, {name: value.detach().clone() for name, value in engine.bank.parameters(slot).items()}


def assert_same(one: tuple[list[float], Any], other: tuple[list[float], Any], tolerance: float = 1e-12) -> None:
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=0, atol=tolerance)


def alone(**changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine, (slot,) = make_engine(make_base("llama"), A, **changes)
    losses, weights = train(engine, slot)
    assert losses[-1] != losses[0]
    return losses, weights


def test_other_jobs_longer_shorter_or_with_dropout() -> None:
    engine, (a, b, c) = make_engine(make_base("llama"), A, LoraConfig(rank=8, dropout=0.5), LoraConfig(rank=2))
    others = {b: lambda step: random_step(step, [40, 3, 22]), c: lambda step: random_step(7 * step, [2])}
    assert_same(train(engine, a, others), alone())


def test_a_job_that_becomes_nan() -> None:
    engine, (a, b) = make_engine(make_base("llama"), A, LoraConfig(rank=8))
    with torch.no_grad():
        for parameter in engine.bank.parameters(b).values():
            parameter.fill_(float("nan"))
    before = {name: value.clone() for name, value in engine.bank.parameters(b).items()}
    assert_same(train(engine, a, {b: lambda step: random_step(step, [20, 6])}), alone())
    assert before.keys() == engine.bank.parameters(b).keys()
    assert engine.jobs[b].step == STEPS
    assert not engine.jobs[b].optimizer.state  # never stepped


@pytest.mark.parametrize("family", ["mixtral", "bloom", "gemma3"])
def test_nan_does_not_cross_in_other_families(family: str) -> None:
    config = LoraConfig(rank=4)
    engine, (a, b) = make_engine(make_base(family), config, config)
    with torch.no_grad():
        for parameter in engine.bank.parameters(b).values():
            parameter.fill_(float("nan"))
    solo, (slot,) = make_engine(make_base(family), config)
    assert_same(train(engine, a, {b: lambda step: random_step(step, [20, 6])}), train(solo, slot))


def test_slot_number_does_not_matter() -> None:
    """N=1 equals slot 2 of N=3: the start depends on the seed, not on the slot."""
    base = make_base("llama")
    engine, slots = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=3))
    third = engine.bank.add(A, seed=0)
    engine.add(third, SFTConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    assert third == 2
    assert_same(train(engine, third, {slots[0]: lambda step: random_step(step, [11])}), alone())


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 30, 10_000])
def test_cutting_a_step_changes_nothing(micro_batch_tokens: int) -> None:
    """Dropout included: draws count from the token's place in the step, not in the batch."""
    engine, (slot,) = make_engine(make_base("llama"), A, micro_batch_tokens=micro_batch_tokens)
    cuts = len(engine.micro_batches({slot: random_step(100, LENGTHS)}))
    assert cuts == {1: 6, 20: 4, 30: 2, 10_000: 1}[micro_batch_tokens]
    assert_same(train(engine, slot), alone())


def test_a_fully_masked_piece_is_harmless() -> None:
    """Micro-batches without a single weighted token, and a step without any: loss 0, gradient 0, no NaN."""
    engine, (slot,) = make_engine(make_base("llama"), A, micro_batch_tokens=10)
    masked = [Segment(np.arange(3, 11), np.zeros(8, np.float32)) for _ in range(2)]
    mixed = engine.forward_backward({slot: [*random_step(1, [9]), *masked]})[slot]
    assert mixed.loss > 0
    engine.optim_step(slot, 0.0)
    nothing = engine.forward_backward({slot: masked})[slot]
    updated = engine.optim_step(slot, 0.0)
    assert (nothing.loss, updated.grad_norm, updated.skipped) == (0.0, 0.0, False)


def test_dropout_is_drawn_anew_each_step_and_off_in_evaluation() -> None:
    engine, (slot,) = make_engine(make_base("llama"), A)
    train(engine, slot, steps=range(2))  # B is no longer zero
    work = {slot: random_step(5, LENGTHS)}
    first = engine.forward_backward(work)[slot].loss
    again = engine.forward_backward(work)[slot].loss
    engine.optim_step(slot, 0.0)
    later = engine.forward_backward(work)[slot].loss
    assert first == again != later
    held_out = [engine.evaluate(work)[slot].loss for _ in range(2)]
    assert held_out[0] == held_out[1] != first


def test_evaluation_changes_nothing() -> None:
    engine, (slot,) = make_engine(make_base("llama"), A)
    losses: list[float] = []
    for step in range(STEPS):
        losses += train(engine, slot, steps=range(step, step + 1))[0]
        engine.evaluate({slot: random_step(1, [30, 4])})
    assert losses == alone()[0]


def test_noise_is_per_job_and_cut_invariant() -> None:
    results = []
    for micro_batch_tokens, with_other in ((10_000, False), (20, True)):
        base = make_base("llama")
        engine, slots = make_engine(base, A, LoraConfig(rank=2), micro_batch_tokens=micro_batch_tokens)
        engine.jobs[slots[0]].neftune_alpha = 5.0
        engine.bank.enable_noise()
        others = {slots[1]: lambda step: random_step(step, [13])} if with_other else None
        results.append(train(engine, slots[0], others))
    assert_same(*results)
    assert results[0][0] != pytest.approx(alone()[0], abs=1e-6)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "long_factor": [4.0] * 4,
    "short_factor": [1.0] * 4,
    "original_max_position_embeddings": 16,
}


def test_a_long_document_does_not_turn_the_positions_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """LongRoPE changes every rotation of a pass that has one long document in it."""
    monkeypatch.setitem(FAMILIES, "longrope", tiny("LlamaConfig", max_position_embeddings=64, rope_parameters=LONGROPE))
    outcomes = []
    for with_other in (False, True):
        engine, (a, b) = make_engine(make_base("longrope"), A, LoraConfig(rank=2))
        others = {b: lambda step: random_step(step, [40, 3, 22])} if with_other else None
        outcomes.append(train(engine, a, others))
    assert_same(*outcomes)
    batches = engine.micro_batches({b: random_step(0, [40, 3, 22, 16, 17, 30])})
    assert [batch.lengths for batch in batches] == [(40,), (3,), (22,), (16,), (17, 30)]


def test_a_rotation_that_remembers_the_longest_document_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    monkeypatch.setitem(FAMILIES, "dynamic", tiny("LlamaConfig", max_position_embeddings=16, rope_parameters=dynamic))
    engine, (slot,) = make_engine(make_base("dynamic"), A)
    engine.forward_backward({slot: random_step(0, [16, 3])})
    with pytest.raises(ModelError, match=r"documents of more than 16 tokens .* set data\.max_length to 16"):
        engine.forward_backward({slot: random_step(0, [17, 3])})
