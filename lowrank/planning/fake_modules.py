"""Stand-ins for layers that cannot run on fake tensors.

Packed weights: no weight at all, and a dense one for as long as a layer computes. A storage's quantizer does not run
on fake tensors, and need not: what it keeps, its Config knows (`bytes_of`), and what computing with it takes is the
dense weight, made anew for each use. Experts in other dtypes than bfloat16: torch's fake grouped_mm knows no other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from lowrank.kernels.shape_bucketing import FINITE_PRODUCT
from lowrank.models.fused_experts import (
    AroundExperts,
    Expert,
    ExpertAssignments,
    PackedExperts,
    Ranges,
    RowCounts,
    choose,
    mix,
)
from lowrank.models.loading.expert_loading import experts_to_pack, parameters_to_pack, with_packed_experts
from lowrank.models.loading.quantize_on_load import linears_to_pack
from lowrank.models.storages import StorageConfig
from lowrank.models.storages.packed import weight_of


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


class _OneAfterTheOther(AroundExperts):
    """Dense experts, multiplied one by one."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        def multiply(projection: str, x_PD: torch.Tensor, chosen: ExpertAssignments) -> torch.Tensor:
            return torch.cat(
                [
                    Expert(self.base, projection, expert)(x_PD[ranges[0][1] : ranges[-1][2]])
                    for expert, ranges in chosen.rows
                ]
            )

        chosen = choose(top_k_index, (), self.num_experts, self.count_rows)
        return mix(self.base, hidden_states, top_k_weights, chosen, multiply)


def spread_evenly(model: nn.Module) -> None:
    """A plan does not know what a router will choose: every expert gets the same share of every slot."""
    for module in model.modules():
        if isinstance(module, (AroundExperts, PackedExperts)):
            module.count_rows = _even_counts


def _even_counts(top_k_index: torch.Tensor, order_P: torch.Tensor, ranges: Ranges, num_experts: int) -> RowCounts:
    del order_P
    num_tokens, num_pairs = len(top_k_index), top_k_index.numel()
    slots = [(slot, (end - first) * num_pairs // num_tokens) for slot, first, end in ranges]
    slots = [(-1, num_pairs - sum(count for _, count in slots)), *slots]
    counts = [
        [count * (expert + 1) // num_experts - count * expert // num_experts for _, count in slots]
        for expert in range(num_experts)
    ]
    return counts, [slot for slot, _ in slots]


def fake_experts(model: Any) -> None:
    """Replace experts that are not packed by ones that run on fake tensors of any dtype."""
    for name, module in experts_to_pack(model, None).items():
        if next(module.parameters()).dtype != torch.bfloat16:
            model.set_submodule(name, _OneAfterTheOther(module))


def fake_packed_weights(model: Any, storage: StorageConfig) -> dict[str, int]:
    """Replace the linears that `storage` packs; the bytes they will take, by full name. Dense: nothing is replaced."""
    sizes: dict[str, int] = {}
    if storage.type == "dense":
        return sizes
    with unset_fake_temporarily():  # it tries small layers of unknown classes
        linears = linears_to_pack(model, storage)
    for name, module in linears.items():
        out_features, in_features = weight_of(module).shape
        sizes[name] = storage.bytes_of((out_features, in_features))
        model.set_submodule(name, _StandIn((out_features, in_features), module.weight, module.bias))
    experts = experts_to_pack(model, storage)
    wanted = parameters_to_pack(experts)
    for name, found in wanted.items():
        weight = model.get_parameter(name)
        found.packed = [_StandIn(found.shape, weight) for _ in range(found.count)]
        sizes[name] = found.count * storage.bytes_of(found.shape)
    with_packed_experts(model, experts, wanted)
    return sizes


@torch.library.register_fake(FINITE_PRODUCT)  # pyright: ignore[reportUntypedFunctionDecorator]
def _finite_product(x_PR: torch.Tensor, y_PD: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Without values all of them are finite."""
    del first, end
    return x_PR.t() @ y_PD
