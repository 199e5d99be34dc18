"""Norms and gated MLPs that keep less: the same bits forward, the same gradients, on every family, and less kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checkpointing.memory_efficient_modules import (
    MemoryEfficientMLP,
    MemoryEfficientNorm,
    use_memory_efficient_modules,
)
from tests.tiny_models import FAMILIES, VOCABULARY, make_base, make_engine, make_model, random_step

RMS_NORMS = {
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "phi3", "glm4",
    "olmo2", "deepseek_v3", "granite", "gpt_oss", "lfm2", "jamba",
}  # fmt: skip
"""Families whose norms are RMSNorms of the two usual kinds."""
GATED = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo2",
    "deepseek_v3",
    "granite",
    "cohere2",
    "stablelm",
}
"""Families whose dense MLPs have three projections of the usual names."""


def run(model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(logits, gradient of the embedded input, bytes kept for the backward pass besides weights)."""
    token_BT = torch.arange(2 * 12).view(2, 12) % VOCABULARY
    embedded = model.get_input_embeddings()(token_BT).detach().to(dtype).requires_grad_()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    logits.square().sum().backward()
    assert embedded.grad is not None
    return logits.detach(), embedded.grad, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"jamba"}))  # jamba's conv wants a cache with inputs_embeds
def test_the_same_function(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    names = set(model.state_dict())
    before, gradient, kept = run(model, dtype)
    use_memory_efficient_modules(model)
    after, lean_gradient, lean_kept = run(model, dtype)
    kinds = {type(module) for module in model.modules()}
    assert (MemoryEfficientNorm in kinds) == (family in RMS_NORMS)
    assert (MemoryEfficientMLP in kinds) == (family in GATED)
    assert set(model.state_dict()) == names
    assert torch.equal(before, after)
    scale = float(gradient.abs().max())
    assert float((gradient - lean_gradient).abs().max()) <= (1e-5 if dtype == torch.float32 else 3e-2) * scale
    if family in RMS_NORMS & GATED:
        assert lean_kept < (0.95 if dtype == torch.float32 else 0.85) * kept


def _note(kept: dict[int, torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    kept[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


@pytest.mark.parametrize("activation_checkpointing", ["none", "full", "selective"])
def test_adapters_learn_as_before_and_the_product_is_not_kept(activation_checkpointing: str) -> None:
    """The down projection's adapter needs its input; act(gate) * up is made again from gate and up."""
    gradients, wide = [], []
    for lean_modules in (False, True):
        base = make_base("llama", torch.float32, intermediate_size=56)
        if lean_modules:
            use_memory_efficient_modules(base.model)
        engine, (one, other) = make_engine(base, LoraConfig(rank=4, dropout=0.2), LoraConfig(rank=2))
        set_activation_checkpointing(base.model, activation_checkpointing)
        for slot in (one, other):
            for parameter in engine.bank.parameters(slot).values():
                torch.nn.init.normal_(parameter, std=0.1)
            engine.bank.refresh(slot)
        kept: dict[int, torch.Tensor] = {}  # held, so that no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(partial(_note, kept), lambda tensor: tensor):
            engine.forward_backward({one: random_step(0, [9, 14]), other: random_step(1, [12])})
        gradients.append(
            {
                f"{slot} {name}": parameter.grad
                for slot in (one, other)
                for name, parameter in engine.bank.parameters(slot).items()
            }
        )
        wide.append(sum(tensor.shape[-1] == 56 and tensor.numel() == 35 * 56 for tensor in kept.values()))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)
    if activation_checkpointing == "none":
        layers = 2
        assert wide == [4 * layers, 2 * layers]  # gate, up, act(gate), product; gate, up


def test_float64_is_left_alone() -> None:
    """transformers' norms compute in float32 and autograd follows them in every bit; ours would differ by rounding."""
    assert all(
        not isinstance(module, MemoryEfficientNorm)
        for module in memory_efficient_modules(make_model("llama")).modules()
    )


def memory_efficient_modules(model: nn.Module) -> nn.Module:
    use_memory_efficient_modules(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_weights_of_norms_learn_as_before(family: str) -> None:
    """In full tuning."""
    gradients = []
    for change in (False, True):
        model = make_model(family, torch.float32).requires_grad_(True)
        if change:
            use_memory_efficient_modules(model)
        run(model, torch.float32)
        gradients.append({name: p.grad for name, p in model.named_parameters() if "norm" in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


class TwiceNorm(nn.Module):
    """Looks like an RMSNorm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def test_what_computes_something_else_stays() -> None:
    model = nn.Sequential(TwiceNorm(), nn.LayerNorm(8), nn.RMSNorm(8))
    assert use_memory_efficient_modules(model) in (0, 1)  # torch's own RMSNorm may be equal bit for bit
    assert isinstance(model[0], TwiceNorm)
    assert isinstance(model[1], nn.LayerNorm)
