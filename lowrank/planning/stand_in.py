"""Packed weights in a simulation: no weight at all, and a dense one for as long as a layer computes.

A storage's quantiser does not run on fake tensors, and need not: what it keeps, its Config knows
(`bytes_of`), and what computing with it takes is the dense weight, made anew for each use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowrank.models.expert_loading import experts_to_pack, parameters_to_pack, with_packed_experts
from lowrank.models.storages import StorageConfig
from lowrank.models.storages.packed import weight_of
from lowrank.models.streaming import linears_to_pack


class _StandIn(nn.Module):
    """A `BaseLinear` whose dense weight exists while it is used."""

    def __init__(self, shape: tuple[int, int], like: Any, bias: Any = None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = bias
        self._dtype, self._device = like.dtype, like.device

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TD, self.dense_weight(), self.bias)

    def dense_weight(self) -> torch.Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device=self._device)


def stand_in_for_packed_weights(model: Any, storage: StorageConfig) -> int:
    """Replace the linears that `storage` packs; the bytes they will take. Dense: 0, and nothing is replaced."""
    if storage.type == "dense":
        return 0
    total = 0
    for name, module in linears_to_pack(model, storage).items():
        out_features, in_features = weight_of(module).shape
        total += storage.bytes_of((out_features, in_features))
        model.set_submodule(name, _StandIn((out_features, in_features), module.weight, module.bias))
    experts = experts_to_pack(model, storage)
    wanted = parameters_to_pack(experts)
    for name, found in wanted.items():
        weight = model.get_parameter(name)
        found.packed = [_StandIn(found.shape, weight) for _ in range(found.count)]
        total += found.count * storage.bytes_of(found.shape)
    with_packed_experts(model, experts, wanted)
    return total
