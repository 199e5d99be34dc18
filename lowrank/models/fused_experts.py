"""Fused experts of a mixture-of-experts layer, one matrix at a time: 3-D parameters that no linear layer stands for.

transformers keeps all experts of a layer in one module (`mlp.experts`) with `gate_up_proj` (E, O, D) and `down_proj`
(E, D, O), and describes its arithmetic by a few attributes (transformers/integrations/moe.py). That is enough to run
any family with another way to multiply: rows that chose an expert meet its matrix in one product, whether the matrix
is a view of the fused parameter, packed by itself, or has adapters (adapters/expert_lora.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowrank.devices import to_device
from lowrank.models.storages.packed import frozen_product

OF_ONE_EXPERT = re.compile(r"(^|\.)\w*experts?\.\d+(\.|$)")
"""The name of a single expert, or of something in it."""
_DESCRIBED_BY = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")


def why_unknown(module: nn.Module) -> str | None:
    """Why the experts in `module` cannot be run one by one, in words for the user; None: they can."""
    if not all(hasattr(module, name) for name in _DESCRIBED_BY):
        kind = type(module).__name__
        return f"{kind} does not follow transformers' interface of experts, so its tokens cannot be told apart"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several devices"
    return None


def projections(module: Any) -> tuple[str, str]:
    """The names of its two fused parameters, in the order of the arithmetic."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def fused_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Its 3-D weights, packed or not, by name."""
    if isinstance(module, PackedExperts):
        return dict(module.shapes)
    return {name: tuple(each.shape) for name, each in module.named_parameters(recurse=False) if each.ndim == 3}


class Expert:
    """One expert's projection as a `BaseLinear`: a view of the fused parameter, or the packed matrix; and its bias."""

    def __init__(self, module: Any, projection: str, index: int) -> None:
        self.bias: torch.Tensor | None = getattr(module, f"{projection}_bias")[index] if module.has_bias else None
        if isinstance(module, PackedExperts) and projection in module.packed:
            packed = self._packed = module.matrix(projection, index)
            self.out_features, self.in_features = packed.out_features, packed.in_features
        else:
            weight = getattr(module, projection)[index]
            self._weight_OD = weight.t() if module.is_transposed else weight
            self._packed = None
            self.out_features, self.in_features = self._weight_OD.shape

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x W^T + b. Not for autograd: the weight may be in scratch memory."""
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        return F.linear(x_TD, self.dense_weight().to(x_TD.dtype), bias)

    def dense_weight(self) -> torch.Tensor:
        """W (O, D)."""
        return self._weight_OD if self._packed is None else self._packed.dense_weight()


class Joined(nn.Module):
    """A `BaseLinear` whose rows are several packed ones': gate and up projection of one expert, stored apart."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        first: Any = parts[0]
        self.in_features: int = first.in_features
        self.out_features: int = sum(part.out_features for part in self._each())
        self.dtype: torch.dtype = first.dtype

    def _each(self) -> list[Any]:
        return list(self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., O)."""
        return frozen_product(x, self)

    def dense_weight(self) -> torch.Tensor:
        """W (O, D) in memory of its own: the parts share one scratch buffer."""
        return torch.cat([part.dense_weight().clone() for part in self._each()])


class AroundExperts(nn.Module):
    """What takes the place of a module of experts and looks like it to the model."""

    is_routed = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.count_rows: CountRows = counted_rows

    def __getattr__(self, name: str) -> Any:
        """What the model asks its experts for, it gets from them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class PackedExperts(nn.Module):
    """The experts of one layer with every matrix packed by itself; nothing is dense but the one in use.

    Children are called as single experts are: `0.gate_up_proj`, `0.down_proj`, `1.gate_up_proj` ... A projection that
    was not packed stays a fused parameter.
    """

    def __init__(self, module: Any, packed: Mapping[str, Sequence[nn.Module]]) -> None:
        """`module`: the model's own experts, which lose their fused weights; `packed`: the matrices by projection."""
        super().__init__()
        self.count_rows: CountRows = counted_rows
        self.shapes, self.packed = fused_shapes(module), frozenset(packed)
        for name in packed:
            delattr(module, name)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in module.named_children():
            self.add_module(name, child)
        for index in range(module.num_experts):
            self.add_module(str(index), nn.ModuleDict({name: each[index] for name, each in packed.items()}))
        object.__setattr__(self, "_described", module)  # what it computes beside products; its tensors are ours now

    def __getattr__(self, name: str) -> Any:
        """What the model asks its experts for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            described = self.__dict__.get("_described")
            if described is None:
                raise
            return getattr(described, name)

    def matrix(self, projection: str, index: int) -> Any:
        """The packed `BaseLinear` of one expert."""
        return self._modules[str(index)][projection]  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, D), (T, K) chosen experts, (T, K) their weights -> (T, D)."""
        alone = (
            getattr(self.config, "_experts_implementation", None) == "batched_mm"
        )  # each token by itself (models/checks/isolation.py)

        def multiply(projection: str, x_PD: torch.Tensor, chosen: ExpertAssignments) -> torch.Tensor:
            outputs = [x_PD.new_zeros(0, Expert(self, projection, 0).out_features)]
            for expert, ranges in chosen.rows:
                rows = x_PD[ranges[0][1] : ranges[-1][2]]
                matrix = Expert(self, projection, expert)
                outputs += [frozen_product(row, matrix) for row in rows.split(1 if alone else len(rows))]
            return torch.cat(outputs)

        chosen = choose(top_k_index, (), self.num_experts, self.count_rows)
        return mix(self, hidden_states, top_k_weights, chosen, multiply)


@dataclass(frozen=True)
class ExpertAssignments:
    """The P = T K (token, expert) pairs of a call, sorted by expert, then token."""

    token_P: torch.Tensor
    order_P: torch.Tensor
    """Each pair's place in (T, K), read row by row."""
    rows: list[tuple[int, list[tuple[int, int, int]]]]
    """(expert, [(slot, first, end)]) of every expert that was chosen; a range covers all its rows, bare ones as -1."""


Multiply = Callable[[str, torch.Tensor, ExpertAssignments], torch.Tensor]
"""(projection, x (P, D), the pairs) -> (P, O)."""


def mix(
    module: Any, hidden_TD: torch.Tensor, weight_TK: torch.Tensor, chosen: ExpertAssignments, multiply: Multiply
) -> torch.Tensor:
    """What transformers' experts compute, (T, D), with `multiply` in the place of their products."""
    first, last = projections(module)
    inner_PO = multiply(first, hidden_TD[chosen.token_P], chosen)
    inner_PF = module._apply_gate(inner_PO) if module.has_gate else module.act_fn(inner_PO)
    outer_PD = multiply(last, inner_PF, chosen)
    if getattr(module, "has_post_expert_norm", False):  # older releases of transformers know none
        outer_PD = module.post_expert_norm(outer_PD)
    weighted_PD = outer_PD * weight_TK.reshape(-1)[chosen.order_P, None]
    back_P = torch.empty_like(chosen.order_P)
    back_P[chosen.order_P] = torch.arange(len(back_P), device=back_P.device)
    return weighted_PD[back_P].view(*weight_TK.shape, -1).sum(1).to(hidden_TD.dtype)


Ranges = Sequence[tuple[int, int, int]]
"""(slot, first, end) of the rows of a call that are not the bare base's."""
RowCounts = tuple[Sequence[Sequence[int]], Sequence[int]]
"""(how many pairs each expert has of each slot in turn, the slots)."""
CountRows = Callable[[torch.Tensor, torch.Tensor, Ranges, int], RowCounts]
"""(chosen experts (T, K), the pairs sorted by expert (P), ranges, number of experts) -> row counts."""


def choose(top_k_index: torch.Tensor, ranges: Ranges, num_experts: int, count_rows: CountRows) -> ExpertAssignments:
    """The pairs in order. `ranges`: of the T rows; `count_rows`: the module's own (`counted_rows`)."""
    order_P = torch.sort(top_k_index.reshape(-1), stable=True).indices
    token_P = order_P // top_k_index.shape[1]
    return ExpertAssignments(token_P, order_P, _rows(*count_rows(top_k_index, order_P, ranges, num_experts)))


def counted_rows(top_k_index: torch.Tensor, order_P: torch.Tensor, ranges: Ranges, num_experts: int) -> RowCounts:
    """As the router has chosen. The device is waited for once, for all counts together: row ranges are the host's."""
    num_tokens, num_choices = top_k_index.shape
    place_T = torch.zeros(num_tokens, dtype=torch.long)  # 0: the bare base, before or between the slots
    for place, (_, first, end) in enumerate(ranges, start=1):
        place_T[first:end] = place
    # bare rows lie before, between and after the slots', so a run is told by where it begins
    run_T = torch.cat([place_T.new_zeros(1), (place_T.diff() != 0).long().cumsum(0)])
    slot_of_run = [ranges[place - 1][0] if place else -1 for place in place_T[_starts(run_T)].tolist()]
    width = len(slot_of_run)
    token_P = order_P // num_choices
    key_P = top_k_index.reshape(-1)[order_P] * width + to_device(run_T, token_P.device)[token_P]
    count_N = key_P.new_zeros(num_experts * width)  # bincount would ask for the least and the greatest key first
    count_N.scatter_add_(0, key_P, torch.ones_like(key_P))
    return count_N.view(-1, width).tolist(), slot_of_run


def _rows(counts: Sequence[Sequence[int]], slots: Sequence[int]) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Row ranges out of how many rows of each slot chose each expert."""
    rows, done = [], 0
    for expert, per_slot in enumerate(counts):
        own = []
        for slot, count in zip(slots, per_slot):
            if count:
                own.append((slot, done, done + count))
                done += count
        if own:
            rows.append((expert, own))
    return rows


def _starts(run_T: torch.Tensor) -> torch.Tensor:
    """The first row of each run."""
    return torch.cat([torch.ones(1, dtype=torch.bool), run_T.diff() != 0]).nonzero()[:, 0]
