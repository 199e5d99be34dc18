"""LoRA on the fused experts of a mixture-of-experts layer (models/fused_experts.py), dense or packed.

The module is wrapped as a linear layer is. Tokens of all slots that chose an expert meet it in one product; each slot
adds its own update, so an expert's projection is a routed linear over the rows that chose it, in the order of tokens
and hence of slots.

Tensors as PEFT's `target_parameters` has them: lora_A (R E, D), rows by expert; lora_B (O, R E), columns by rank, then
expert. Dropout does not reach them, as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lowrank.adapters.linear import LayerAdapter
from lowrank.adapters.lora_function import SlotUpdate, routed_product
from lowrank.adapters.routing import Routing
from lowrank.models.fused_experts import AroundExperts, Expert, ExpertAssignments, choose, mix, projections, why_unknown


def why_not(module: nn.Module, parameter: str) -> str | None:
    """Why an adapter cannot go to `parameter` of `module`, in words for the user; None: it can."""
    reason = why_unknown(module)
    if reason is None and parameter not in projections(module):
        return f"{parameter} is no projection of {type(module).__name__}; it has {', '.join(projections(module))}"
    return reason


_ByExpert = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Parts:
    """One slot's adapter at one projection, by expert: A and B as computed with, and those that receive gradients."""

    scale: float
    A: _ByExpert
    B: _ByExpert
    master_A: _ByExpert
    master_B: _ByExpert


class RoutedExperts(AroundExperts):
    """The fused experts of one layer with the adapters of any number of slots."""

    def __init__(self, base: nn.Module, name: str, routing: Routing) -> None:
        super().__init__(base)
        self.name = name
        self.routing = routing
        self.adapters: dict[int, dict[str, LayerAdapter]] = {}
        """By slot and projection."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, D), (T, K) chosen experts, (T, K) their weights -> (T, D)."""
        ranges = self.routing.current.in_rows_of(len(hidden_states), self.name)
        if not any(slot in self.adapters for slot, _, _ in ranges):
            return self.base(hidden_states, top_k_index, top_k_weights)
        chosen = choose(top_k_index, ranges, self.num_experts, self.count_rows)
        return mix(self.base, hidden_states, top_k_weights, chosen, self._project)

    def _project(self, projection: str, x_PD: torch.Tensor, chosen: ExpertAssignments) -> torch.Tensor:
        parts = {
            slot: _by_expert(own[projection], x_PD.dtype, self.num_experts)
            for slot, own in self.adapters.items()
            if projection in own
        }
        outputs, done = [x_PD[:0].new_zeros(0, Expert(self.base, projection, 0).out_features)], 0
        for expert, ranges in chosen.rows:
            updates, masters = [], []
            for slot, first, end in ranges:
                if slot in parts:
                    own = parts[slot]
                    updates.append(SlotUpdate(first - done, end - done, own.scale, own.A[expert], own.B[expert]))
                    masters += [own.master_A[expert], own.master_B[expert]]
            end = ranges[-1][2]
            outputs.append(routed_product(x_PD[done:end], Expert(self.base, projection, expert), updates, masters))
            done = end
        return torch.cat(outputs)


def _by_expert(adapter: LayerAdapter, dtype: torch.dtype, num_experts: int) -> _Parts:
    """(scale, A and B in the compute dtype, A and B that receive gradients), each by expert."""
    low_rank = adapter.variant.as_low_rank(adapter.masters)
    assert low_rank is not None, "checked by the bank"
    working_A, working_B = adapter.in_compute_dtype(dtype, low_rank)
    return _Parts(adapter.scale, *_cut(working_A, working_B, num_experts), *_cut(*low_rank, num_experts))


def _cut(A: torch.Tensor, B: torch.Tensor, num_experts: int) -> tuple[_ByExpert, _ByExpert]:
    """(R, D) and (O, R) of every expert. Unbound, not indexed: the gradients come back in one piece."""
    return A.view(num_experts, -1, A.shape[1]).unbind(0), B.view(B.shape[0], -1, num_experts).unbind(2)
