"""Jobs beside one another: each has the losses and gradients that it has alone, and NaN stays in its slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from lowrank.segments import Segment
from lowrank.train.engine import Engine


def assert_isolated(
    engine: Engine,
    slots: Sequence[int],
    work: Mapping[int, Sequence[Segment]],
    *,
    loss: float = 1e-12,
    rtol: float = 1e-9,
    atol: float = 1e-12,
) -> dict[int, dict[str, torch.Tensor]]:
    """All together, in whole passes and in small ones, against each alone; then with the second slot's parameters NaN.
    The gradients of all together, by slot and name. `loss`, `rtol`, `atol`: how close losses and gradients must be."""

    def clear() -> None:
        for each in slots:
            engine.jobs[each].optimizer.zero_grad()

    whole = engine.forward_backward(work)
    grads = {
        slot: {k: p.grad.clone() for k, p in engine.bank.parameters(slot).items() if p.grad is not None}
        for slot in slots
    }
    for micro_batch_tokens in (4096, 17):
        engine.micro_batch_tokens = micro_batch_tokens
        for slot in slots:
            clear()
            assert engine.forward_backward({slot: work[slot]})[slot].loss == pytest.approx(whole[slot].loss, abs=loss)
            for key, value in grads[slot].items():
                found: Any = engine.bank.parameters(slot)[key].grad
                torch.testing.assert_close(found, value, rtol=rtol, atol=atol)
    with torch.no_grad():
        for value in engine.bank.parameters(slots[1]).values():
            value.fill_(float("nan"))
    engine.micro_batch_tokens = 4096
    clear()
    poisoned = engine.forward_backward(work)
    assert poisoned[slots[1]].loss != poisoned[slots[1]].loss
    for slot in (each for each in slots if each != slots[1]):
        assert poisoned[slot].loss == pytest.approx(whole[slot].loss, abs=1e-12)
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in engine.bank.parameters(slot).values())
    return grads
