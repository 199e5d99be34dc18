"""LoRA while decoding: few rows of each slot in a step, and the same few shapes.

On NVIDIA's GPUs two kernels serve all rows, each with the A and B of its slot (decode_lora_triton.py).

On a CPU a small product in bf16 costs about 25 us to start. So all slots go through two batched products where they
have about as many rows, and numbers of rows are rounded up (kernels/shape_bucketing.py). Rows added are rows of
somebody; what comes of them is thrown away, so no value of one slot meets another's. Nothing is kept for a backward
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch.nn import functional as F

from lowrank.devices import to_device
from lowrank.kernels.fused import plain_only, runs_fused
from lowrank.kernels.shape_bucketing import bucketed_rows

_FEW_ROWS = 32
"""Rows of one slot up to which a product of its own costs more to start than to compute."""
_ROWS_OF_ANSWERS = 128
_GROUPS = 4
"""Numbers of slots are rounded up to its multiples."""

Ranges = tuple[tuple[int, int], ...]
"""[first row, end row) of each slot, in order."""


@dataclass(frozen=True)
class Stack:
    """A and B of G slots side by side, of one rank (padded with zeros); the last one again up to a multiple of four."""

    A_GRD: torch.Tensor
    B_GOR: torch.Tensor
    scales: tuple[float, ...]


def stack(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], scales: Sequence[float]) -> Stack:
    """Copies, but for a single slot."""
    if len(pairs) == 1:
        ((A_RD, B_OR),) = pairs
        return Stack(A_RD[None], B_OR[None], tuple(scales))
    rank = max(len(A_RD) for A_RD, _ in pairs)
    added = -len(pairs) % _GROUPS
    A_GRD = torch.stack([F.pad(A_RD, (0, 0, 0, rank - len(A_RD))) for A_RD, _ in (*pairs, *[pairs[-1]] * added)])
    B_GOR = torch.stack([F.pad(B_OR, (0, rank - B_OR.shape[1])) for _, B_OR in (*pairs, *[pairs[-1]] * added)])
    return Stack(A_GRD, B_GOR, (*scales, *[scales[-1]] * added))


def add_updates_by_row(
    y_TO: torch.Tensor,
    x_TD: torch.Tensor,
    A_GRD: torch.Tensor,
    B_GOR: torch.Tensor,
    scale_G: torch.Tensor,
    group_T: torch.Tensor,
) -> None:
    """Add to each row of `y_TO`, in place, the update of its group (-1: none). Rows of a group are together, groups are
    in order, and each has a row.

    An operator, and of tensors alone: a compiled layer and a CUDA graph stay right when others answer in the next step.
    """
    torch.ops.lowrank.add_decode_updates(y_TO, x_TD, A_GRD, B_GOR, scale_G, group_T)


def _add_by_row(
    y_TO: torch.Tensor,
    x_TD: torch.Tensor,
    A_GRD: torch.Tensor,
    B_GOR: torch.Tensor,
    scale_G: torch.Tensor,
    group_T: torch.Tensor,
) -> None:
    if x_TD.device.type != "cpu" or runs_fused(x_TD, _check):
        add_updates_of_rows(x_TD, y_TO, A_GRD, B_GOR, scale_G, group_T)
    elif ranges := _ranges_of(group_T.tolist()):
        add_updates(x_TD, y_TO, Stack(A_GRD, B_GOR, tuple(scale_G.tolist())), ranges)


_OPERATORS = torch.library.Library("lowrank", "FRAGMENT")
"""Not `custom_op`, which costs 40 us of Python in every call: a step calls this one for each linear layer."""
_OPERATORS.define(
    "add_decode_updates(Tensor(a!) y_TO, Tensor x_TD, Tensor A_GRD, Tensor B_GOR, Tensor scale_G, Tensor group_T) -> ()"
)
_OPERATORS.impl("add_decode_updates", _add_by_row, "CompositeExplicitAutograd")
torch.library.register_fake("lowrank::add_decode_updates", lambda *given: None, lib=_OPERATORS)


def add_updates(x_TD: torch.Tensor, y_TO: torch.Tensor, stacked: Stack, ranges: Ranges) -> None:
    """Add every slot's update to its rows of `y_TO`, in place."""
    lengths = [end - first for first, end in ranges]
    padded = 1 << (max(lengths) - 1).bit_length()
    if len(ranges) > 1 and padded <= _FEW_ROWS and padded * len(stacked.scales) <= 2 * max(sum(lengths), _FEW_ROWS):
        _all_at_once(x_TD, y_TO, stacked, ranges, padded)
    else:
        _one_by_one(x_TD, y_TO, stacked, ranges)


def add_updates_of_rows(
    x_TD: torch.Tensor,
    y_TO: torch.Tensor,
    A_GRD: torch.Tensor,
    B_GOR: torch.Tensor,
    scale_G: torch.Tensor,
    group_T: torch.Tensor,
) -> None:
    """`add_updates_by_row` where nobody may ask which rows those are: every row fetches its own A and B."""
    if runs_fused(x_TD, _check):
        from lowrank.kernels.decode_lora_triton import add_updates_triton

        return add_updates_triton(x_TD, y_TO, A_GRD, B_GOR, scale_G, group_T)
    own_T = group_T.clamp_min(0)
    h_TR1 = torch.bmm(A_GRD[own_T], x_TD[:, :, None]) * scale_G.to(x_TD.dtype)[own_T, None, None]
    update_TO = torch.bmm(B_GOR[own_T], h_TR1)[:, :, 0]
    y_TO.add_(update_TO.masked_fill_((group_T < 0)[:, None], 0))
    return None


def answers_rows(x_TD: torch.Tensor) -> bool:
    """Whether there is something here for these rows, and it beats a product for each slot: not for the questions on a
    GPU, whose rows of one slot are many."""
    return x_TD.device.type == "cpu" or (len(x_TD) <= _ROWS_OF_ANSWERS and runs_fused(x_TD, _check))


@lru_cache(maxsize=4)
def groups_of(ranges: Ranges, rows: int, device: torch.device) -> torch.Tensor:
    """(T) which of the ranges each row is in, -1 for none. All layers of a step ask."""
    group_T = torch.full((rows,), -1)
    for group, (first, end) in enumerate(ranges):
        group_T[first:end] = group
    return to_device(group_T, device)


def _check(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The Triton body beside `add_updates_of_rows`."""
    from lowrank.kernels.decode_lora_triton import add_updates_triton

    pairs = []
    for rank, width, height in ((16, 1000, 200), (5, 70, 1000)):
        A_GRD, B_GOR = (
            torch.randn(shape, dtype=dtype, device=device) for shape in ((3, rank, width), (3, height, rank))
        )
        x_TD, ours_TO = (torch.randn(37, each, dtype=dtype, device=device) for each in (width, height))
        scale_G, group_T = torch.tensor([0.1, 0.05, 0.2], device=device), torch.arange(37, device=device) % 4 - 1
        plain_TO = ours_TO.clone()
        add_updates_triton(x_TD, ours_TO, A_GRD, B_GOR, scale_G, group_T)
        with plain_only():
            add_updates_of_rows(x_TD, plain_TO, A_GRD, B_GOR, scale_G, group_T)
        pairs.append((ours_TO, plain_TO))
    return pairs


def _ranges_of(groups: list[int]) -> Ranges:
    """Of each group."""
    numbers = range(max(groups, default=-1) + 1)
    return tuple((first := groups.index(each), first + groups.count(each)) for each in numbers)


def _one_by_one(x_TD: torch.Tensor, y_TO: torch.Tensor, stacked: Stack, ranges: Ranges) -> None:
    for (first, end), A_RD, B_OR, scale in zip(ranges, stacked.A_GRD, stacked.B_GOR, stacked.scales):
        start = max(0, min(first, len(x_TD) - bucketed_rows(end - first)))
        rows = slice(start, start + bucketed_rows(end - first))
        update_NO = (x_TD[rows] @ A_RD.t()) @ B_OR.t()
        y_TO[first:end].add_(update_NO[first - start : end - start], alpha=scale)


def _all_at_once(x_TD: torch.Tensor, y_TO: torch.Tensor, stacked: Stack, ranges: Ranges, padded: int) -> None:
    places = _places(ranges, len(stacked.scales), padded)
    h_GNR = torch.bmm(x_TD[places.row_GN], stacked.A_GRD.transpose(1, 2))
    alpha = stacked.scales[0]
    if len(set(stacked.scales)) > 1:
        h_GNR *= torch.tensor(stacked.scales, dtype=h_GNR.dtype)[:, None, None]
        alpha = 1.0
    update_KO = torch.bmm(h_GNR, stacked.B_GOR.transpose(1, 2)).flatten(0, 1)
    if places.kept_K is not None:
        update_KO = update_KO.index_select(0, places.kept_K)
    if places.row_K is None:
        y_TO[ranges[0][0] : ranges[-1][1]].add_(update_KO, alpha=alpha)
    else:
        y_TO.index_add_(0, places.row_K, update_KO, alpha=alpha)


@dataclass(frozen=True)
class _Places:
    """Rows by slot, which of them are no padding (None: all), and the rows those are (None: one after another)."""

    row_GN: torch.Tensor
    kept_K: torch.Tensor | None
    row_K: torch.Tensor | None


@lru_cache(maxsize=4)
def _places(ranges: Ranges, groups: int, padded: int) -> _Places:
    """All layers of a step ask."""
    each = [*ranges, *[ranges[-1]] * (groups - len(ranges))]
    row_GN = torch.tensor([[min(first + place, end - 1) for place in range(padded)] for first, end in each])
    kept = [group * padded + row - first for group, (first, end) in enumerate(ranges) for row in range(first, end)]
    full = len(kept) == groups * padded
    follow = all(before[1] == after[0] for before, after in pairwise(ranges))
    row_K = None if follow else torch.tensor([row for first, end in ranges for row in range(first, end)])
    return _Places(row_GN, None if full else torch.tensor(kept), row_K)
