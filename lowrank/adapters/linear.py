"""The routed linear (LoRA linear): one frozen layer with the adapters of any number of slots.

A slot whose variant says its update as a low-rank pair goes through the LoRA forward and backward of lora_function.py,
where it has a gain also through output_gain.py; any other through its variant's own `apply`, with plain autograd.
While a model answers, all low-rank slots go through the kernels of kernels/decode_lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lowrank.adapters.lora_function import SlotUpdate, routed_product
from lowrank.adapters.output_gain import Gain, apply_gains
from lowrank.adapters.routing import Routing
from lowrank.adapters.variants.base import OutputGain, Tensors, Variant, gain_of, low_rank_of
from lowrank.devices import to_device
from lowrank.kernels.counter_random import dropout
from lowrank.kernels.decode_lora import (
    add_updates,
    add_updates_by_row,
    add_updates_of_rows,
    answers_rows,
    groups_of,
    stack,
)
from lowrank.kernels.rematerialize import rematerialization_of
from lowrank.models.storages import BaseLinear, bias_of
from lowrank.models.storages.dense import DenseLinear


@dataclass
class LayerAdapter:
    """One slot's adapter at one layer: its `masters` (fp32, trained or frozen), and A, B in the compute dtype."""

    variant: Variant
    scale: float
    masters: Tensors
    compute_dtype_weights: tuple[torch.Tensor, torch.Tensor] | None = None
    """None: the masters have the compute dtype, or are cast in every pass."""
    dropout: float = 0.0

    def in_compute_dtype(self, dtype: torch.dtype, low_rank: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """A and B in the compute dtype, from `low_rank`, which are the masters', where no copies are kept."""
        if self.compute_dtype_weights is not None:
            return [tensor.to(dtype) for tensor in self.compute_dtype_weights]
        return [tensor.detach().to(dtype) for tensor in low_rank]


class StackedAdapters:
    """The A and B of several adapters of one layer, stacked for a decoding step. They are reused from step to step,
    until other adapters decode or weights change (`is_of`)."""

    def __init__(self, adapters: Sequence[LayerAdapter | None], base: BaseLinear, x_TD: torch.Tensor) -> None:
        """None stands for a slot that has nothing at this layer. `x_TD`: an input, or no row of one."""
        self._adapters = adapters  # held, so that none of them makes room for another of its identity
        self._versions = [_versions(adapter) for adapter in adapters]
        pairs, dtype = [], x_TD.dtype
        for adapter in adapters:
            if adapter is None:
                pairs.append((x_TD.new_zeros(1, base.in_features), x_TD.new_zeros(base.out_features, 1)))
                continue
            low_rank = adapter.variant.as_low_rank(adapter.masters)
            if low_rank is None or isinstance(adapter.variant, OutputGain):
                self.stack = None
                return
            A_RD, B_OR = adapter.in_compute_dtype(dtype, low_rank)
            pairs.append((A_RD, B_OR))
        self.stack = stack(pairs, [0.0 if adapter is None else adapter.scale for adapter in adapters])
        self.scale_G = to_device(torch.tensor(self.stack.scales), x_TD.device)

    def is_of(self, adapters: Sequence[LayerAdapter | None]) -> bool:
        """These adapters, with the weights they have now."""
        return (
            len(adapters) == len(self._adapters)
            and all(mine is theirs for mine, theirs in zip(self._adapters, adapters))
            and all(_versions(adapter) == mine for adapter, mine in zip(adapters, self._versions))
        )


def _versions(adapter: LayerAdapter | None) -> list[int]:
    """Counted by torch with every change in place."""
    if adapter is None:
        return []
    return [tensor._version for tensor in adapter.compute_dtype_weights or adapter.masters.values()]


class RoutedLinear(nn.Module):
    """A frozen `BaseLinear` with the adapters of any number of slots. Its parameters live in the bank."""

    is_routed = True

    def __init__(self, base: BaseLinear, name: str, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.routing = routing
        self.adapters: dict[int, LayerAdapter] = {}
        self._stacked: StackedAdapters | None = None
        self._side_by_side: StackedAdapters | None = None
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for code that asks a linear layer for it (Mamba); of a packed one in memory of its own."""
        weight_OD = self.base.dense_weight()
        return weight_OD if isinstance(self.base, DenseLinear) else weight_OD.clone()

    @property
    def bias(self) -> torch.Tensor | None:
        """(O) of the base, which is not trained; None where it has none."""
        return getattr(self.base, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.reshape(-1, self.in_features)
        if self.routing.current.group_T is not None and not torch.is_grad_enabled():
            return self._answer_by_row(x_TD).view(*x.shape[:-1], self.out_features)
        if self.routing.current.decoding and not torch.is_grad_enabled() and answers_rows(x_TD):
            y_TO = self._answer(x_TD)
            if y_TO is not None:
                return y_TO.view(*x.shape[:-1], self.out_features)
        updates: list[SlotUpdate] = []
        masters: list[torch.Tensor] = []  # of the updates: A_0, B_0, A_1, B_1, ...
        gains: list[Gain] = []
        excesses: list[torch.Tensor] = []  # of the gains
        others: list[tuple[int, int, int, LayerAdapter]] = []
        counter_T = self.routing.current.counters(len(x_TD))
        for slot, first, end in self.routing.current.in_rows_of(len(x_TD), self.name):
            adapter = self.adapters.get(slot)
            if adapter is None:
                continue
            rate, key = self._dropout(slot, adapter)
            low_rank = low_rank_of(adapter.variant, adapter.masters, dropped=bool(rate))
            if low_rank is None:
                others.append((slot, first, end, adapter))
                continue
            A_RD, B_OR = adapter.in_compute_dtype(x_TD.dtype, low_rank)
            updates.append(SlotUpdate(first, end, adapter.scale, A_RD, B_OR, rate, key, counter_T))
            masters += low_rank
            excess_O = gain_of(adapter.variant, adapter.masters)
            if excess_O is not None:
                gains.append(Gain(first, end, excess_O.detach().to(x_TD.dtype)))
                excesses.append(excess_O)
        y_TO = routed_product(x_TD, self.base, updates, masters, rematerialization_of(x))
        if gains:
            y_TO = apply_gains(y_TO, bias_of(self.base), gains, excesses)
        if others:
            y_TO = self._apply_others(x_TD, y_TO, others)
        return y_TO.view(*x.shape[:-1], self.out_features)

    def remove(self, slot: int) -> None:
        """Free what a slot has here."""
        self.adapters.pop(slot, None)
        self._stacked = self._side_by_side = None

    def put_side_by_side(self, slots: Sequence[int], x_TD: torch.Tensor) -> bool:
        """Hold the adapters of these slots ready for passes whose context has a `group_T`, an index into `slots` for
        each row. `x_TD`: no row of an input. False where one is more than low-rank: such a pass must not be made."""
        adapters = [self.adapters.get(slot) for slot in slots]
        if not any(adapters):
            self._side_by_side = None
            return True
        if self._side_by_side is None or not self._side_by_side.is_of(adapters):
            self._side_by_side = StackedAdapters(adapters, self.base, x_TD)
        return self._side_by_side.stack is not None

    @property
    def shape_side_by_side(self) -> torch.Size | None:
        """(G, R, D) of what `put_side_by_side` holds: other shapes may be compiled anew."""
        held = self._side_by_side
        return None if held is None or held.stack is None else held.stack.A_GRD.shape

    def _answer(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        """All slots' updates by the kernels for answers; None if one of them is more than low-rank."""
        ranges = [each for each in self.routing.current.in_rows_of(len(x_TD), self.name) if each[0] in self.adapters]
        if not ranges:
            return self.base(x_TD)
        adapters = [self.adapters[slot] for slot, _, _ in ranges]
        if self._stacked is None or not self._stacked.is_of(adapters):
            self._stacked = StackedAdapters(adapters, self.base, x_TD)
        if self._stacked.stack is None:
            return None
        y_TO = self.base(x_TD)
        rows = tuple((first, end) for _, first, end in ranges)
        if x_TD.device.type == "cpu":
            add_updates(x_TD, y_TO, self._stacked.stack, rows)
        else:
            held, group_T = self._stacked.stack, groups_of(rows, len(x_TD), x_TD.device)
            add_updates_of_rows(x_TD, y_TO, held.A_GRD, held.B_GOR, self._stacked.scale_G, group_T)
        return y_TO

    def _answer_by_row(self, x_TD: torch.Tensor) -> torch.Tensor:
        """All slots' updates, of tensors alone: a compiled layer reads nothing else that changes between steps."""
        y_TO = self.base(x_TD)
        held = self._side_by_side
        if held is not None and held.stack is not None:
            group_T = self.routing.current.groups_of_rows(len(x_TD), self.name)
            add_updates_by_row(y_TO, x_TD, held.stack.A_GRD, held.stack.B_GOR, held.scale_G, group_T)
        return y_TO

    def _dropout(self, slot: int, adapter: LayerAdapter) -> tuple[float, int]:
        """(probability, key) of a slot's dropout here; probability 0 where nothing is drawn."""
        key = self.routing.current.key(slot, self.name) if adapter.dropout else None
        return (0.0, 0) if key is None else (adapter.dropout, key)

    def _apply_others(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, others: list[tuple[int, int, int, LayerAdapter]]
    ) -> torch.Tensor:
        """The slots whose variant is no low-rank update, by their own `apply`."""
        parts, done = [], 0
        for slot, first, end, adapter in others:
            rate, key = self._dropout(slot, adapter)
            x_own = x_TD[first:end]
            if rate:
                counter_T = self.routing.current.counters(len(x_TD))
                assert counter_T is not None
                x_own = dropout(x_own, counter_T[first:end], key, rate)
            y_own = y_TO[first:end].clone()  # what one slot does to it in place is no other's affair
            own = adapter.variant.apply(x_own, y_own, self.base, adapter.scale, adapter.masters)
            parts += [y_TO[done:first], own]
            done = end
        return torch.cat([*parts, y_TO[done:]])
