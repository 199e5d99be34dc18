"""Which modules of a simulated model would be replaced by memory-efficient ones, without its weights.

That is found out by trying, which fake tensors cannot do; so a small real copy is tried: what a norm or a gated MLP
computes does not depend on its width.
"""

# A module is copied without its weights, for which torch offers nothing.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lowrank.models.checkpointing.memory_efficient_modules import (
    MemoryEfficientMLP,
    MemoryEfficientNorm,
    same_bits,
    use_memory_efficient_modules,
)

_WIDTH = 32


def use_memory_efficient_fakes(model: nn.Module) -> int:
    """`use_memory_efficient_modules` on a model of fake tensors; how many modules were replaced."""
    known: dict[Any, bool] = {}

    def same(module: nn.Module, replacement: MemoryEfficientNorm | MemoryEfficientMLP) -> bool:
        dtype = next(module.parameters()).dtype
        key = (type(module), type(replacement), getattr(replacement, "kind", None), dtype)
        if key not in known:
            known[key] = _try(module, replacement, dtype)
        return known[key]

    return use_memory_efficient_modules(model, same)


def _try(module: nn.Module, replacement: MemoryEfficientNorm | MemoryEfficientMLP, dtype: torch.dtype) -> bool:
    small = copy.copy(module)
    small._modules = dict(module._modules)
    small._parameters = dict(module._parameters)
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers go on as if nothing had been tried
    if isinstance(replacement, MemoryEfficientNorm):
        weight = torch.rand(_WIDTH, generator=generator) + 0.5
        small._parameters["weight"] = nn.Parameter(weight.to(dtype), requires_grad=False)
        return same_bits(small, MemoryEfficientNorm(small, replacement.eps, replacement.kind))
    for name in ("gate_proj", "up_proj", "down_proj"):
        bias = getattr(module, name).bias is not None
        linear = nn.utils.skip_init(nn.Linear, _WIDTH, _WIDTH, bias=bias, dtype=dtype).requires_grad_(False)
        for parameter in linear.parameters():  # as torch begins a linear layer
            parameter.uniform_(-(_WIDTH**-0.5), _WIDTH**-0.5, generator=generator)
        small._modules[name] = linear
    return same_bits(small, MemoryEfficientMLP(small))
