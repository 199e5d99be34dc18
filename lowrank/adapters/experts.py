"""Adapters on the fused experts of a mixture: 3-D parameters that no linear layer stands for.

transformers keeps all experts of a layer in one module (`mlp.experts`) with `gate_up_proj` (E, O, D) and `down_proj`
(E, D, O), and describes its arithmetic by a few attributes (transformers/integrations/moe.py). The module is wrapped
as a linear layer is. Tokens of all slots that chose an expert meet it in one product; each slot adds its own update,
so an expert's projection is a routed linear over the rows that chose it, in the order of tokens and hence of slots.

Tensors as PEFT's `target_parameters` has them: lora_A (R E, D), rows by expert; lora_B (O, R E), columns by rank, then
expert. Dropout does not reach them, as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowrank.adapters.linear import LayerAdapter, Piece, routed_product
from lowrank.adapters.routing import Routing

_DESCRIBED_BY = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts", "_apply_gate")


def why_not(module: nn.Module, parameter: str) -> str | None:
    """Why an adapter cannot go to `parameter` of `module`, in words for the user; None: it can."""
    kind = type(module).__name__
    if not all(hasattr(module, name) for name in _DESCRIBED_BY):
        return f"{kind} does not follow transformers' interface of experts, so its tokens cannot be told apart"
    if parameter not in _projections(module):
        return f"{parameter} is no projection of {kind}; it has {', '.join(_projections(module))}"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several devices"
    return None


def _projections(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


class Expert:
    """One expert's projection as a `BaseLinear`: a view of the fused parameter."""

    def __init__(self, module: Any, projection: str, index: int) -> None:
        weight = getattr(module, projection)[index]
        self.weight_OD = weight.t() if module.is_transposed else weight
        self.bias = getattr(module, f"{projection}_bias")[index] if module.has_bias else None
        self.out_features, self.in_features = self.weight_OD.shape

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x W^T + b."""
        return F.linear(x_TD, self.weight_OD, self.bias)

    def dense_weight(self) -> torch.Tensor:
        """W (O, D)."""
        return self.weight_OD


@dataclass(frozen=True)
class _Chosen:
    """The P = T K (token, expert) pairs of a call, sorted by expert, then token."""

    token_P: torch.Tensor
    rows: list[tuple[int, list[tuple[int, int, int]]]]
    """(expert, [(slot, first, end)]) of every expert that was chosen; a range covers all its rows, bare ones as -1."""


_ByExpert = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Parts:
    """One slot's adapter at one projection, by expert: A and B as computed with, and those that receive gradients."""

    scale: float
    A: _ByExpert
    B: _ByExpert
    master_A: _ByExpert
    master_B: _ByExpert


class RoutedExperts(nn.Module):
    """The fused experts of one layer with the adapters of any number of slots."""

    is_routed = True

    def __init__(self, base: nn.Module, name: str, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.routing = routing
        self.adapters: dict[int, dict[str, LayerAdapter]] = {}
        """By slot and projection."""

    def __getattr__(self, name: str) -> Any:
        """What the model asks its experts for, it gets from them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, D), (T, K) chosen experts, (T, K) their weights -> (T, D)."""
        ranges = self.routing.in_rows_of(len(hidden_states), self.name)
        if not any(slot in self.adapters for slot, _, _ in ranges):
            return self.base(hidden_states, top_k_index, top_k_weights)
        module: Any = self.base
        chosen, order_P = _choose(top_k_index, ranges, module.num_experts)
        inner_PO = self._project(_projections(module)[0], hidden_states[chosen.token_P], chosen)
        inner_PF = module._apply_gate(inner_PO) if module.has_gate else module.act_fn(inner_PO)
        outer_PD = self._project("down_proj", inner_PF, chosen)
        if module.has_post_expert_norm:
            outer_PD = module.post_expert_norm(outer_PD)
        weighted_PD = outer_PD * top_k_weights.reshape(-1)[order_P, None]
        back_P = torch.empty_like(order_P)
        back_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        summed_TD = weighted_PD[back_P].view(*top_k_index.shape, -1).sum(1)
        return summed_TD.to(hidden_states.dtype)

    def _project(self, projection: str, x_PD: torch.Tensor, chosen: _Chosen) -> torch.Tensor:
        parts = {
            slot: _by_expert(own[projection], x_PD.dtype, self.num_experts)
            for slot, own in self.adapters.items()
            if projection in own
        }
        outputs, done = [x_PD[:0].new_zeros(0, Expert(self.base, projection, 0).out_features)], 0
        for expert, ranges in chosen.rows:
            pieces, masters = [], []
            for slot, first, end in ranges:
                if slot in parts:
                    own = parts[slot]
                    pieces.append(Piece(first - done, end - done, own.scale, own.A[expert], own.B[expert]))
                    masters += [own.master_A[expert], own.master_B[expert]]
            end = ranges[-1][2]
            outputs.append(routed_product(x_PD[done:end], Expert(self.base, projection, expert), pieces, masters))
            done = end
        return torch.cat(outputs)


def _by_expert(adapter: LayerAdapter, dtype: torch.dtype, num_experts: int) -> _Parts:
    """(scale, A and B in the compute dtype, A and B that receive gradients), each by expert."""
    low_rank = adapter.variant.as_low_rank(adapter.masters)
    assert low_rank is not None, "checked by the bank"
    working_A, working_B = adapter.at_work(dtype, low_rank)
    return _Parts(adapter.scale, *_cut(working_A, working_B, num_experts), *_cut(*low_rank, num_experts))


def _cut(A: torch.Tensor, B: torch.Tensor, num_experts: int) -> tuple[_ByExpert, _ByExpert]:
    """(R, D) and (O, R) of every expert. Unbound, not indexed: the gradients come back in one piece."""
    return A.view(num_experts, -1, A.shape[1]).unbind(0), B.view(B.shape[0], -1, num_experts).unbind(2)


def _choose(
    top_k_index: torch.Tensor, ranges: list[tuple[int, int, int]], num_experts: int
) -> tuple[_Chosen, torch.Tensor]:
    """(the pairs in order, for each of them its place in `top_k_index` read row by row)."""
    num_tokens, num_choices = top_k_index.shape
    place_T = torch.zeros(num_tokens, dtype=torch.long)  # 0: the bare base, before or between the slots
    for place, (_, first, end) in enumerate(ranges, start=1):
        place_T[first:end] = place
    order_P = torch.sort(top_k_index.reshape(-1), stable=True).indices
    token_P = order_P // num_choices
    # bare rows lie before, between and after the slots', so a run is told by where it begins
    run_T = torch.cat([place_T.new_zeros(1), (place_T.diff() != 0).long().cumsum(0)])
    slot_of_run = [ranges[place - 1][0] if place else -1 for place in place_T[_starts(run_T)].tolist()]
    width = len(slot_of_run)
    key_P = top_k_index.reshape(-1)[order_P] * width + run_T.to(token_P.device)[token_P]
    counts = torch.bincount(key_P, minlength=num_experts * width).view(-1, width).tolist()
    rows, done = [], 0
    for expert, per_run in enumerate(counts):
        own = []
        for slot, count in zip(slot_of_run, per_run):
            if count:
                own.append((slot, done, done + count))
                done += count
        if own:
            rows.append((expert, own))
    return _Chosen(token_P, rows), order_P


def _starts(run_T: torch.Tensor) -> torch.Tensor:
    """The first row of each run."""
    return torch.cat([torch.ones(1, dtype=torch.bool), run_T.diff() != 0]).nonzero()[:, 0]
