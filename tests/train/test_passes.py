"""A pass is made ready on the host and sent to a device without waiting for it, on tensors that only say cuda:0.

So the host is passes ahead of the device: a batch is pinned and its copy queued while the device still computes the one
before, and nothing is left that a stream of its own for batches could hide (docs/log.md).
"""

from __future__ import annotations

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import Batch
from lowrank.models.base import Base
from lowrank.train import passes
from lowrank.train.prepared_pass import PreparedPass
from tests.rehearsal.fake_gpu import GPU, Waits, on_gpu
from tests.tiny_models import VOCABULARY, make_base, make_engine, random_step


def ready_on_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[Batch, PreparedPass, Waits]:
    """A batch of three jobs, one of them with dropout, and the pass over it."""
    adapters = [LoraConfig(rank=4), LoraConfig(rank=2, dropout=0.1), LoraConfig(rank=4)]
    engine, slots = make_engine(make_base("llama"), *adapters)
    (batch,) = engine.micro_batches({slot: random_step(slot, [9, 30, 4], VOCABULARY) for slot in slots})
    monkeypatch.setattr(Base, "device", GPU)
    with on_gpu() as waits:
        return batch, engine.passes.ready(batch, wanted_T=engine._scores.targets(batch)), waits


def test_nobody_waits_for_the_device_while_a_pass_is_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, ready, waits = ready_on_gpu(monkeypatch)
    assert not waits.found
    sent: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)
        return tensor

    ready.moved(note)
    assert len(sent) > 10
    assert all(tensor.device == GPU for tensor in sent)
    assert batch.token_T.device.type == "cpu", "the batch itself stays where counting waits for nobody"


def test_a_copy_from_memory_that_is_not_pinned_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "to_device", lambda tensor, device: tensor.to(device, non_blocking=True))
    _, _, waits = ready_on_gpu(monkeypatch)
    assert sum(waits.found.values()) > 10
