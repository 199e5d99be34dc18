"""The LoRA forward and LoRA backward of one frozen layer, for the adapters of any number of slots at once.

For each slot, on its own rows (P of the T rows of the call), with s = scale, W (O, D) frozen, A (R, D), B (O, R):

    forward     h = drop(x) A^T                 (P, R)
                y = x W^T + b + s h B^T         (P, O)     one base GEMM over all T rows, then the small ones

    backward    g  = s dy B                     (P, R)     the gradient of h
                dA = g^T drop(x)                (R, D)
                dB = s dy^T h                   (O, R)
                dx = dy W + drop(g A)           (P, D)     one GEMM over all T rows, then the small ones; dropout is
                                                           its own transpose, so the mask is drawn again, not kept

Kept between the two, see `SavedForBackward`: x and h; never a copy of x, a mask, or a dense weight. A gain on the
outputs (DoRA) is an operation of its own behind this one: output_gain.py. A NaN in one slot's rows stays in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.kernels.counter_random import dropout
from lowrank.kernels.grouped import grouped_backward, grouped_forward, prefers_grouped
from lowrank.kernels.rematerialize import Rematerialization, rematerialization_of
from lowrank.kernels.shape_bucketing import row_bucket
from lowrank.models.storages import BaseLinear


@dataclass(frozen=True)
class SlotUpdate:
    """The low-rank update of one slot on its rows of this call."""

    first: int
    end: int
    scale: float
    A_RD: torch.Tensor
    B_OR: torch.Tensor
    dropout: float = 0.0
    key: int = 0
    counter_N: torch.Tensor | None = None

    def drop(self, x_PD: torch.Tensor, rows: slice) -> torch.Tensor:
        """Dropout as this update draws it for these rows of the call; linear, and its own transpose."""
        if not self.dropout or self.counter_N is None:
            return x_PD
        return dropout(x_PD, self.counter_N[rows], self.key, self.dropout)


@dataclass(frozen=True)
class SavedForBackward:
    """What the forward pass leaves to the backward pass. Tensors go through `save_for_backward`, so that activation
    checkpointing and offloading see them."""

    x_parts: tuple[torch.Tensor, ...]
    """What `make_x` makes x (T, D) from: as a rule x itself, the same tensor that other layers with this input keep.
    Empty where no A is trained (LoRA-FA, MiSS): nothing then asks for x."""
    h: tuple[torch.Tensor, ...]
    """drop(x) A^T: (P, R) of each update, or (T, R) of all of them where they were computed as groups."""

    def keep(self, ctx: Any, make_x: Callable[..., torch.Tensor]) -> None:
        """Put it into the autograd context."""
        ctx.make_x, ctx.num_x_parts = make_x, len(self.x_parts)
        ctx.save_for_backward(*self.x_parts, *self.h)

    @classmethod
    def of(cls, ctx: Any) -> SavedForBackward:
        """Take it from the context: once, since a checkpoint gives each tensor once."""
        tensors = ctx.saved_tensors
        return cls(tensors[: ctx.num_x_parts], tensors[ctx.num_x_parts :])

    def x(self, ctx: Any) -> torch.Tensor | None:
        """x (T, D), made again where that is cheaper than keeping it; None where it was not kept."""
        return ctx.make_x(*self.x_parts).reshape(-1, ctx.base.in_features) if self.x_parts else None


def routed_product(
    x_TD: torch.Tensor,
    base: BaseLinear,
    updates: Sequence[SlotUpdate],
    masters: Sequence[torch.Tensor],
    recipe: Rematerialization | None = None,
) -> torch.Tensor:
    """x W^T + b with each update on its rows, inside autograd.

    `masters`: A_0, B_0, A_1, B_1, ..., which receive the gradients; arithmetic uses the updates' copies. `recipe` makes
    x again, in any leading shape.
    """
    recipe = recipe or rematerialization_of(x_TD)
    function = GroupedLoraFunction if prefers_grouped(x_TD, updates) else LoraFunction
    return function.apply(x_TD, base, tuple(updates), recipe, *masters)  # pyright: ignore[reportReturnType]


_FIRST_MASTER = 4
"""Where A_0 stands among the inputs of both functions, behind x, base, updates and recipe."""


class LoraFunction(torch.autograd.Function):
    """One slot after the other, each in small GEMMs on its own rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        base: BaseLinear,
        updates: tuple[SlotUpdate, ...],
        recipe: Rematerialization,
        *masters: torch.Tensor,
    ) -> torch.Tensor:
        del masters
        y_TO = base(x_TD)
        h: list[torch.Tensor] = []
        for update in updates:
            # On CPUs in 16 bits the rows are rounded up to a few shapes; `zero_other_rows` zeroes the neighbors' rows.
            bucket = row_bucket(x_TD, update.first, update.end)
            h_PR = bucket.zero_other_rows(update.drop(x_TD[bucket.rows], bucket.rows) @ update.A_RD.t())
            bucket.add(y_TO, h_PR, update.B_OR.t(), update.scale)  # y += s h B^T
            h.append(h_PR)
        ctx.base, ctx.updates = base, updates
        if updates:
            trains_A = any(ctx.needs_input_grad[_FIRST_MASTER::2])
            SavedForBackward(recipe.parts if trains_A else (), tuple(h)).keep(ctx, recipe.make)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (dy_TO,) = outer
        updates: tuple[SlotUpdate, ...] = ctx.updates
        # The base's share of dx. Below, each update adds its own to its rows in place.
        dx_TD = dy_TO @ ctx.base.dense_weight() if ctx.needs_input_grad[0] else None
        if not updates:
            return dx_TD, None, None, None
        saved = SavedForBackward.of(ctx)
        x_TD = saved.x(ctx)
        gradients: list[torch.Tensor | None] = []
        for update, h_PR in zip(updates, saved.h):
            bucket = row_bucket(dy_TO, update.first, update.end)
            dy_PO = dy_TO[bucket.rows]
            # g = s dy B. Rows that are not the slot's own are zero in g and h, so neither product below sees them.
            g_PR = bucket.zero_other_rows((dy_PO @ update.B_OR).mul_(update.scale))
            # dA = g^T drop(x), with the mask of the forward pass drawn again from the same counters.
            trains_A = ctx.needs_input_grad[_FIRST_MASTER + len(gradients)]
            x_PD = x_TD[bucket.rows] if x_TD is not None and trains_A else None
            gradients.append(None if x_PD is None else bucket.contract(g_PR, update.drop(x_PD, bucket.rows)))
            # dB = s dy^T h.
            gradients.append(bucket.contract(dy_PO, h_PR).mul_(update.scale))
            # dx += drop(g A).
            if dx_TD is not None:
                if update.dropout:
                    dx_PD = update.drop(g_PR @ update.A_RD, bucket.rows)
                    dx_TD[update.first : update.end] += dx_PD[bucket.inside]
                else:
                    bucket.add(dx_TD, g_PR, update.A_RD, 1.0)
        return dx_TD, None, None, None, *gradients


class GroupedLoraFunction(torch.autograd.Function):
    """The same formulas for many slots on a GPU, whose small GEMMs are taken together (kernels/grouped.py)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        base: BaseLinear,
        updates: tuple[SlotUpdate, ...],
        recipe: Rematerialization,
        *masters: torch.Tensor,
    ) -> torch.Tensor:
        del masters
        y_TO = base(x_TD)
        h = grouped_forward(x_TD, y_TO, updates)  # y += s h B^T, in place
        ctx.base, ctx.updates = base, updates
        SavedForBackward(recipe.parts, tuple(h)).keep(ctx, recipe.make)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (dy_TO,) = outer
        saved = SavedForBackward.of(ctx)
        x_TD = saved.x(ctx)
        assert x_TD is not None, "kept whole: the kernel computes dA of all slots or of none"
        dx_TD = dy_TO @ ctx.base.dense_weight() if ctx.needs_input_grad[0] else None
        # dA and dB of every slot; the slots' share of dx is added to `dx_TD` in place.
        return dx_TD, None, None, None, *grouped_backward(dy_TO, x_TD, saved.h[0], dx_TD, ctx.updates)
