"""Many slots at once on a GPU: the low-rank products of all slots as four grouped GEMMs.

The loop in adapters/lora_function.py costs about six launches per slot and layer; `F.grouped_mm` costs four
in all. Same meaning, other kernel. Ranks are padded with zeros to the largest (a multiple of 8): padded
rows of A and columns of B are zero and their gradients are cut off, so nothing changes. What a CPU does while it
answers is in kernels/decode_lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import torch
from torch.nn import functional as F

from lowrank.devices import to_device
from lowrank.kernels.accelerators import capability

_MANY = 4
_MULTIPLE = 8
"""grouped_mm wants strides of 16 bytes."""


class LowRank(Protocol):
    """What an update must offer: rows [first, end), scale, A (R, D), B (O, R)."""

    @property
    def first(self) -> int:
        """First row of x (T, D) that is its own."""
        ...

    @property
    def end(self) -> int:
        """The row behind its last one."""
        ...

    @property
    def scale(self) -> float:
        """What B A x is multiplied with."""
        ...

    @property
    def A_RD(self) -> torch.Tensor:
        """(R, D), in the dtype of x."""
        ...

    @property
    def B_OR(self) -> torch.Tensor:
        """(O, R), in the dtype of x."""
        ...

    @property
    def dropout(self) -> float:
        """Share of its inputs that are dropped."""
        ...


def prefers_grouped(x_TD: torch.Tensor, updates: Sequence[LowRank]) -> bool:
    """More than four slots without dropout, bf16, widths that fit the kernel, on a GPU that has it."""
    return len(updates) > _MANY and x_TD.is_cuda and has_grouped_kernel(x_TD.device) and can_group(x_TD, updates)


def has_grouped_kernel(device: torch.device) -> bool:
    """Hopper's and data-center Blackwell's. Elsewhere torch copies `offs` to the host in every call and multiplies
    group by group, so each of the four products would wait for everything before it; the loop over slots waits for
    nothing."""
    return capability(device)[0] in (9, 10)


def can_group(x_TD: torch.Tensor, updates: Sequence[LowRank]) -> bool:
    """Whether the kernel takes these operands at all (on any device): the rows of each update begin where those of the
    one before end, since groups are told apart by their ends alone."""
    return (
        x_TD.dtype == torch.bfloat16
        and x_TD.shape[1] % _MULTIPLE == 0
        and updates[0].B_OR.shape[0] % _MULTIPLE == 0
        and not any(update.dropout for update in updates)
        and all(one.end == other.first for one, other in pairwise(updates))
    )


def _stack(updates: Sequence[LowRank]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, slice]:
    """A (G, R, D), scale * B (G, O, R), end rows (G) and the rows they cover together."""
    widest = max(update.A_RD.shape[0] for update in updates)
    rank = -(-widest // _MULTIPLE) * _MULTIPLE
    A_GRD = torch.stack([F.pad(update.A_RD, (0, 0, 0, rank - update.A_RD.shape[0])) for update in updates])
    B_GOR = torch.stack([F.pad(update.B_OR * update.scale, (0, rank - update.B_OR.shape[1])) for update in updates])
    begin = updates[0].first
    end_G = _ends(tuple(update.end - begin for update in updates), A_GRD.device)
    return A_GRD, B_GOR, end_G, slice(begin, updates[-1].end)


@lru_cache(maxsize=8)
def _ends(ends: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """All layers of a pass ask, forward and backward; copied to the device each time, each would wait for the copy."""
    return to_device(torch.tensor(ends, dtype=torch.int32), device)


def grouped_forward(x_TD: torch.Tensor, y_TO: torch.Tensor, updates: Sequence[LowRank]) -> list[torch.Tensor]:
    """Add every slot's update to `y_TO` in place; `[x A^T]` (T, R) for the backward pass.

    The rows of the updates follow one another (`can_group`).
    """
    A_GRD, B_GOR, end_G, rows = _stack(updates)
    h_TR = F.grouped_mm(x_TD[rows], A_GRD.transpose(1, 2), offs=end_G)
    y_TO[rows] += F.grouped_mm(h_TR, B_GOR.transpose(1, 2), offs=end_G)
    return [h_TR]


def grouped_backward(
    dy_TO: torch.Tensor,
    x_TD: torch.Tensor,
    h_TR: torch.Tensor,
    dx_TD: torch.Tensor | None,
    updates: Sequence[LowRank],
) -> list[torch.Tensor]:
    """[dA_0, dB_0, dA_1, dB_1, ...]; adds the slots' share to `dx_TD` in place."""
    A_GRD, B_GOR, end_G, rows = _stack(updates)
    dy_TO = dy_TO[rows].contiguous()
    g_TR = F.grouped_mm(dy_TO, B_GOR, offs=end_G)
    dA_GRD = F.grouped_mm(g_TR.t(), x_TD[rows], offs=end_G)
    dB_GOR = F.grouped_mm(dy_TO.t(), h_TR, offs=end_G)
    if dx_TD is not None:
        dx_TD[rows] += F.grouped_mm(g_TR, A_GRD, offs=end_G)
    gradients = []
    for index, update in enumerate(updates):
        rank = update.A_RD.shape[0]
        gradients += [dA_GRD[index, :rank], dB_GOR[index, :, :rank] * update.scale]
    return gradients
