"""Every recompute policy: the same bits, and what it promises to keep and to compute again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import pack
from lowrank.errors import ModelError
from lowrank.models.checkpointing import activation_checkpointing
from lowrank.models.checkpointing.activation_checkpointing import segment_length, set_activation_checkpointing
from lowrank.models.checkpointing.activation_offload import HostMemory
from tests.tiny_models import make_base, make_engine, random_step

POLICIES: list[str | int] = ["selective", "full", "sqrt", 2, "offload"]


@pytest.fixture(autouse=True)
def _offload_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mechanism of `offload` runs on any device; here everything moves, from host memory to host memory."""
    whole = activation_checkpointing._runs

    def runs(model: Any, policy: str | int, num_layers: int) -> Any:
        return (
            [HostMemory(model, small=0).run] * num_layers if policy == "offload" else whole(model, policy, num_layers)
        )

    monkeypatch.setattr(activation_checkpointing, "_runs", runs)


def gradients(family: str, policy: str | int, dtype: torch.dtype) -> tuple[list[float], list[torch.Tensor]]:
    """(losses, gradients) of a step of two jobs, one with dropout and one with noise, in two micro-batches."""
    base = make_base(family, dtype, **({} if family == "gpt2" else {"num_hidden_layers": 5}))
    engine, slots = make_engine(base, LoraConfig(rank=4, dropout=0.2), LoraConfig(rank=2), micro_batch_tokens=60)
    engine.bank.enable_noise()
    engine.jobs[slots[1]].neftune_alpha = 5.0
    set_activation_checkpointing(base.model, policy)
    with torch.no_grad():
        for slot in slots:
            for parameter in engine.bank.parameters(slot).values():
                parameter.add_(0.01)
            engine.bank.refresh(slot)
    done = engine.forward_backward({slot: random_step(slot, [9, 20, 33]) for slot in slots})
    found = [parameter.grad for slot in slots for parameter in engine.bank.parameters(slot).values()]
    return [done[slot].loss for slot in slots], [each for each in found if each is not None]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float64) for family in ("llama", "mistral", "deepseek_v3", "gpt2", "bloom")),
        ("llama", torch.bfloat16),
        ("qwen3_moe", torch.float32),
    ],
)
def test_every_policy_gives_the_same_bits(family: str, dtype: torch.dtype) -> None:
    losses, kept = gradients(family, "none", dtype)
    for policy in POLICIES:
        again, found = gradients(family, policy, dtype)
        assert again == losses, policy
        assert len(kept) == len(found)
        assert all(torch.equal(one, other) for one, other in zip(kept, found)), policy


class Counter(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def count_work(policy: str | int, num_layers: int) -> tuple[int, int]:
    """(calls of fused attention, calls of one projection's base GEMM) in one training step, in units of layers."""
    base = make_base("llama", torch.bfloat16, num_hidden_layers=num_layers)
    engine, (slot,) = make_engine(base, LoraConfig(rank=2))
    set_activation_checkpointing(base.model, policy)
    projections: list[int] = []
    for name in engine.bank.slots[slot].layers:
        if name.endswith("gate_proj"):
            base.model.get_submodule(name).base.register_forward_hook(lambda *_: projections.append(1))
    with Counter() as counter:
        engine.forward_backward({slot: random_step(0, [32])})
    fused = sum(n for name, n in counter.calls.items() if "flash_attention_for_cpu" in name)
    return fused, len(projections)


@pytest.mark.parametrize(
    ("policy", "attention", "projections"),
    [("none", 9, 9), ("selective", 9, 18), ("full", 18, 18), (4, 13, 13), ("sqrt", 24, 24), ("offload", 9, 9)],
)
def test_what_is_computed_again(policy: str | int, attention: int, projections: int) -> None:
    """Of 9 layers. `sqrt` has 3 segments of 3: every layer again, the first two of each once more."""
    assert count_work(policy, num_layers=9) == (attention, projections)


class Held:
    """Bytes of the different storages that a graph saves between forward and backward pass."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def held_bytes(policy: str | int) -> int:
    base = make_base("llama", num_hidden_layers=9)
    engine, (slot,) = make_engine(base, LoraConfig(rank=2))
    set_activation_checkpointing(base.model, policy)
    held = Held()
    with saved_tensors_hooks(held.pack, lambda tensor: tensor):
        engine.bank.hidden(pack([(slot, segment) for segment in random_step(0, [64])]), engine.passes.rng_keys())
    return sum(held.storages.values())


def test_policies_keep_less_and_less() -> None:
    """What is saved outside the layers; each layer's own hooks take its tensors away from the outer ones."""
    kept = {policy: held_bytes(policy) for policy in ("none", 4, "full")}
    assert kept["none"] > 1.5 * kept[4] > 2 * kept["full"]


def test_segments() -> None:
    assert [segment_length(n) for n in (0, 1, 2, 4, 9, 10, 32, 36)] == [1, 1, 2, 2, 3, 4, 6, 6]


@pytest.fixture
def _real_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


@pytest.mark.usefixtures("_real_policies")
def test_offload_on_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="in host memory already; use selective, full or sqrt"):
        set_activation_checkpointing(make_base("llama").model, "offload")


def test_a_policy_can_be_taken_back() -> None:
    base = make_base("llama")
    engine, (slot,) = make_engine(base, LoraConfig(rank=2))
    work = {slot: random_step(0, [9])}
    losses = set()
    for policy in ("none", "full", "sqrt", "none"):
        set_activation_checkpointing(base.model, policy)
        losses.add(engine.forward_backward(work)[slot].loss)
    assert len(losses) == 1
    layers = [module for module in base.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert not any(layer.training for layer in layers)
    assert not any(module._forward_pre_hooks for module in base.model.modules())
