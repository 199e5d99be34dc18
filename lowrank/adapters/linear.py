"""The routed linear: one frozen layer, any number of adapters, one autograd Function.

Forward: one base GEMM over all rows, then per slot y += scale * (drop(x) A^T) B^T on its rows, and where a slot
has a gain y += (g - 1) * (y - b). Backward: one GEMM for dx, then the small ones for dA, dB and their share of
dx. Saved: x itself (which other layers with the same input share; what it is made of, where it says so; nothing where
no A is trained) and x A^T; never a copy of x, never the mask, never a dense weight. A NaN in one slot's rows stays in
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lowrank.adapters.frozen import bias_of
from lowrank.adapters.routing import Routing
from lowrank.adapters.variants import Tensors, Variant
from lowrank.kernels.answering import add_updates, stack
from lowrank.kernels.counter_random import dropout
from lowrank.kernels.few_shapes import window
from lowrank.kernels.grouped import grouped_backward, grouped_forward, prefers_grouped
from lowrank.kernels.recipe import Recipe, recipe_of
from lowrank.models.storages import BaseLinear


@dataclass
class LayerAdapter:
    """One slot's adapter at one layer: its `masters` (fp32, trained or frozen), and A, B in the compute dtype."""

    variant: Variant
    scale: float
    masters: Tensors
    copies: tuple[torch.Tensor, torch.Tensor] | None = None
    """None: the masters have the compute dtype, or are cast in every pass."""
    dropout: float = 0.0

    def at_work(self, dtype: torch.dtype, low_rank: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """A and B as the arithmetic takes them, `low_rank` being the masters'."""
        return [tensor.detach().to(dtype) for tensor in self.copies or low_rank]


class StackedAdapters:
    """The adapters of a step that answers, side by side: the same from step to step, until others answer or weights
    change.
    """

    def __init__(self, adapters: list[LayerAdapter], dtype: torch.dtype) -> None:
        self._adapters = adapters  # held, so that none of them makes room for another of its identity
        self._versions = [_versions(adapter) for adapter in adapters]
        pairs = []
        for adapter in adapters:
            low_rank = adapter.variant.as_low_rank(adapter.masters)
            if (
                low_rank is None
                or not adapter.variant.rides(False)
                or adapter.variant.excess_gain(adapter.masters) is not None
            ):
                self.stack = None
                return
            A_RD, B_OR = adapter.at_work(dtype, low_rank)
            pairs.append((A_RD, B_OR))
        self.stack = stack(pairs, [adapter.scale for adapter in adapters])

    def is_of(self, adapters: list[LayerAdapter]) -> bool:
        """These adapters, with the weights they have now."""
        return (
            len(adapters) == len(self._adapters)
            and all(mine is theirs for mine, theirs in zip(self._adapters, adapters))
            and all(_versions(adapter) == mine for adapter, mine in zip(adapters, self._versions))
        )


def _versions(adapter: LayerAdapter) -> list[int]:
    """Counted by torch with every change in place."""
    return [tensor._version for tensor in adapter.copies or adapter.masters.values()]


@dataclass(frozen=True)
class Piece:
    """The low-rank update of one slot on its rows of this call."""

    first: int
    end: int
    scale: float
    A_RD: torch.Tensor
    B_OR: torch.Tensor
    dropout: float = 0.0
    key: int = 0
    counter_N: torch.Tensor | None = None
    excess_O: torch.Tensor | None = None
    """g - 1, where the slot's outputs have a gain."""

    def drop(self, x_PD: torch.Tensor, rows: slice) -> torch.Tensor:
        """Dropout as this piece draws it for these rows of the call; linear, and its own transpose."""
        if not self.dropout or self.counter_N is None:
            return x_PD
        return dropout(x_PD, self.counter_N[rows], self.key, self.dropout)


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
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for code that asks a linear layer for it."""
        return self.base.dense_weight()

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return getattr(self.base, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.reshape(-1, self.in_features)
        if self.routing.answering and not torch.is_grad_enabled() and not x.is_cuda:
            y_TO = self._answer(x_TD)
            if y_TO is not None:
                return y_TO.view(*x.shape[:-1], self.out_features)
        pieces: list[Piece] = []
        masters: list[torch.Tensor] = []
        others: list[tuple[int, int, int, LayerAdapter]] = []
        for slot, first, end in self.routing.in_rows_of(len(x_TD), self.name):
            adapter = self.adapters.get(slot)
            if adapter is None:
                continue
            rate, key = self._dropout(slot, adapter)
            low_rank = adapter.variant.as_low_rank(adapter.masters)
            if low_rank is None or not adapter.variant.rides(bool(rate)):
                others.append((slot, first, end, adapter))
                continue
            piece, own = make_piece(adapter, low_rank, x_TD.dtype, first, end)
            pieces.append(replace(piece, dropout=rate, key=key, counter_N=self.routing.counter_N) if rate else piece)
            masters += own
        y_TO = routed_product(x_TD, self.base, pieces, masters, recipe_of(x))
        if others:
            y_TO = self._apply_others(x_TD, y_TO, others)
        return y_TO.view(*x.shape[:-1], self.out_features)

    def remove(self, slot: int) -> None:
        """Free what a slot has here."""
        self.adapters.pop(slot, None)
        self._stacked = None

    def _answer(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        """All slots' updates by the kernels for answers; None if one of them is more than low-rank."""
        ranges = [each for each in self.routing.in_rows_of(len(x_TD), self.name) if each[0] in self.adapters]
        if not ranges:
            return self.base(x_TD)
        adapters = [self.adapters[slot] for slot, _, _ in ranges]
        if self._stacked is None or not self._stacked.is_of(adapters):
            self._stacked = StackedAdapters(adapters, x_TD.dtype)
        if self._stacked.stack is None:
            return None
        y_TO = self.base(x_TD)
        add_updates(x_TD, y_TO, self._stacked.stack, tuple((first, end) for _, first, end in ranges))
        return y_TO

    def _dropout(self, slot: int, adapter: LayerAdapter) -> tuple[float, int]:
        """(probability, key) of a slot's dropout here; probability 0 where nothing is drawn."""
        key = self.routing.key(slot, self.name) if adapter.dropout else None
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
                assert self.routing.counter_N is not None
                x_own = dropout(x_own, self.routing.counter_N[first:end], key, rate)
            y_own = y_TO[first:end].clone()  # what one slot does to it in place is no other's affair
            own = adapter.variant.apply(x_own, y_own, self.base, adapter.scale, adapter.masters)
            parts += [y_TO[done:first], own]
            done = end
        return torch.cat([*parts, y_TO[done:]])


def make_piece(
    adapter: LayerAdapter, low_rank: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, first: int, end: int
) -> tuple[Piece, list[torch.Tensor]]:
    """(a slot's update on rows [first, end), what of it receives gradients: A, B, and g - 1 if it has a gain)."""
    A_RD, B_OR = adapter.at_work(dtype, low_rank)
    excess_O = adapter.variant.excess_gain(adapter.masters)
    if excess_O is None:
        return Piece(first, end, adapter.scale, A_RD, B_OR), [*low_rank]
    return Piece(first, end, adapter.scale, A_RD, B_OR, excess_O=excess_O.detach().to(dtype)), [*low_rank, excess_O]


def routed_product(
    x_TD: torch.Tensor,
    base: BaseLinear,
    pieces: Sequence[Piece],
    masters: Sequence[torch.Tensor],
    recipe: Recipe | None = None,
) -> torch.Tensor:
    """x W^T + b with each piece's update on its rows, inside autograd. `recipe` makes x again, in any leading shape."""
    recipe = recipe or recipe_of(x_TD)
    return _RoutedLinear.apply(x_TD, base, tuple(pieces), recipe, *masters)  # pyright: ignore[reportReturnType]


_MASTERS = 4
"""Where `masters` begin among the inputs of `_RoutedLinear`."""


class _RoutedLinear(torch.autograd.Function):
    """`masters` (A_0, B_0, [g_0 - 1,] A_1, B_1, ...) are inputs only to receive gradients; arithmetic uses the
    pieces' copies."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        base: BaseLinear,
        pieces: tuple[Piece, ...],
        recipe: Recipe,
        *masters: torch.Tensor,
    ) -> torch.Tensor:
        del masters
        y_TO = base(x_TD)
        grouped = prefers_grouped(x_TD, pieces)
        gained: list[torch.Tensor] = []
        if grouped:
            shrunk = grouped_forward(x_TD, y_TO, pieces)
        else:
            shrunk = []
            for piece in pieces:
                own = window(x_TD, piece.first, piece.end)
                shrunk.append(own.own_alone(piece.drop(x_TD[own.rows], own.rows) @ piece.A_RD.t()))
                own.add(y_TO, shrunk[-1], piece.B_OR.t(), piece.scale)
                if piece.excess_O is not None:
                    gained.append(_without(y_TO[piece.first : piece.end], bias_of(base)))
                    y_TO[piece.first : piece.end].addcmul_(gained[-1], piece.excess_O)
        ctx.base, ctx.pieces, ctx.grouped, ctx.num_gained, ctx.make = base, pieces, grouped, len(gained), recipe.make
        if pieces:
            keeps_x = grouped or any(ctx.needs_input_grad[_MASTERS + place] for place in _places_of_A(pieces))
            ctx.num_parts = len(recipe.parts) if keeps_x else 0
            ctx.save_for_backward(*recipe.parts[: ctx.num_parts], *shrunk, *gained)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (dy_TO,) = outer
        pieces: tuple[Piece, ...] = ctx.pieces
        if not pieces:
            return dy_TO @ ctx.base.dense_weight() if ctx.needs_input_grad[0] else None, None, None, None
        saved = ctx.saved_tensors  # once: a checkpoint gives each of them once
        parts, saved = saved[: ctx.num_parts], saved[ctx.num_parts :]
        x_TD = ctx.make(*parts).reshape(-1, ctx.base.in_features) if parts else None
        shrunk, gained = saved[: len(saved) - ctx.num_gained], iter(saved[len(saved) - ctx.num_gained :])
        of_gains: dict[int, torch.Tensor] = {}
        if ctx.num_gained:
            dy_TO = dy_TO.clone()
            for index, piece in enumerate(pieces):
                if piece.excess_O is not None:
                    dy_own = dy_TO[piece.first : piece.end]
                    of_gains[index] = (dy_own * next(gained)).sum(0, dtype=_wide(dy_TO.dtype))
                    dy_own.addcmul_(dy_own.clone(), piece.excess_O)
        dx_TD = dy_TO @ ctx.base.dense_weight() if ctx.needs_input_grad[0] else None
        if ctx.grouped:
            assert x_TD is not None
            return dx_TD, None, None, None, *grouped_backward(dy_TO, x_TD, shrunk[0], dx_TD, pieces)
        gradients: list[torch.Tensor | None] = []
        for index, (piece, h_PR) in enumerate(zip(pieces, shrunk)):
            own = window(dy_TO, piece.first, piece.end)
            dy_PO = dy_TO[own.rows]
            g_PR = own.own_alone((dy_PO @ piece.B_OR).mul_(piece.scale))
            trains_A = ctx.needs_input_grad[_MASTERS + len(gradients)]
            x_PD = x_TD[own.rows] if x_TD is not None and trains_A else None
            gradients.append(None if x_PD is None else own.contract(g_PR, piece.drop(x_PD, own.rows)))
            gradients.append(own.contract(dy_PO, h_PR).mul_(piece.scale))
            if index in of_gains:
                gradients.append(of_gains[index])
            if dx_TD is not None:
                if piece.dropout:
                    dx_PD = piece.drop(g_PR @ piece.A_RD, own.rows)
                    dx_TD[piece.first : piece.end] += dx_PD[own.inside]
                else:
                    own.add(dx_TD, g_PR, piece.A_RD, 1.0)
        return dx_TD, None, None, None, *gradients


def _places_of_A(pieces: tuple[Piece, ...]) -> list[int]:
    """Where in `masters` each piece's A stands."""
    places, place = [], 0
    for piece in pieces:
        places.append(place)
        place += 2 if piece.excess_O is None else 3
    return places


def _without(y_TO: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    return y_TO.clone() if bias_O is None else y_TO - bias_O


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
