"""What keeps the planner from growing an engine of its own again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

import lowrank
from lowrank.adapters.routing import ForwardContext
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import pack
from tests.tiny_models import make_base, make_engine, random_step

SOURCES = {path: path.read_text("utf-8") for path in Path(lowrank.__file__).parent.rglob("*.py")}


def test_fake_tensors_are_known_in_planning_alone() -> None:
    found = {path.parent.name for path, text in SOURCES.items() if re.search(r"fake_tensor|FakeTensor", text)}
    assert found == {"planning"}


def test_planning_uses_nothing_private_of_the_engine_and_repeats_no_pass() -> None:
    for path, text in SOURCES.items():
        if path.parent.name == "planning":
            assert not re.search(r"engine\._|\.backward\(\)|import logprobs", text), path.name


def test_no_forward_is_assigned() -> None:
    assert not [path.name for path, text in SOURCES.items() if re.search(r"\.forward = ", text)]


class Phases:
    """Which phases were run, and what the layers were told in each."""

    def __init__(self, engine: object) -> None:
        self.engine = engine
        self.seen: list[tuple[str, ForwardContext]] = []

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        yield
        self.seen.append((name, self.engine.bank.routing.current))  # type: ignore[attr-defined]

    def forward(self) -> contextlib.AbstractContextManager[None]:
        return self._phase("forward")

    def loss(self) -> contextlib.AbstractContextManager[None]:
        return self._phase("loss")

    def backward(self) -> contextlib.AbstractContextManager[None]:
        return self._phase("backward")


def test_a_traced_pass_is_a_training_pass() -> None:
    """Dropout included: the gradients of the log-probabilities' sum, which is minus an SFT loss times its tokens."""
    work, gradients = random_step(0, [9, 14, 5]), []
    for traced in (True, False):
        engine, (slot,) = make_engine(make_base("llama"), LoraConfig(rank=4, dropout=0.3))
        with torch.no_grad():
            for parameter in engine.bank.parameters(slot).values():
                parameter.add_(0.05)
        engine.bank.refresh(slot)
        for segment in work:
            segment.weight_L[segment.weight_L != 0] = 1.0
        if traced:
            phases = Phases(engine)
            ready = engine.passes.prepare(pack([(slot, segment) for segment in work]))
            engine.passes.trace(ready, phases)
            assert [name for name, _ in phases.seen] == ["forward", "loss", "backward"]
            assert all(context is ready.context for _, context in phases.seen)
            assert engine.bank.routing.current.ranges == ()
            scale = -1.0
        else:
            scale = sum(engine.forward_backward({slot: work})[slot].totals.values())
        gradients.append([scale * p.grad for p in engine.bank.parameters(slot).values() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # norms round to float32
