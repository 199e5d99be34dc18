"""Weights quantized in groups of neighbors along a row: codes, a scale and a zero point for each group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Solver = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Groups (N, S), float32 -> codes (N, S) in [0, 2^bits), scale (N, 1), zero (N, 1)."""


@dataclass(frozen=True)
class Groups:
    """w = (code - zero) * scale."""

    code_OD: torch.Tensor
    """uint8, in [0, 2^bits)."""
    scale_OG: torch.Tensor
    zero_OG: torch.Tensor
    group_size: int

    def weight(self) -> torch.Tensor:
        """(O, D) float32."""
        group_D = torch.arange(self.code_OD.shape[1], device=self.code_OD.device) // self.group_size
        return (self.code_OD.float() - self.zero_OG.float()[:, group_D]) * self.scale_OG.float()[:, group_D]


def in_groups(weight_OD: torch.Tensor, group_size: int | None, solve: Solver) -> Groups:
    """`solve` on every group; the last group of a row has what is left. None: a row is one group."""
    rows, columns = weight_OD.shape
    size = min(group_size or columns, columns)
    weight_OD = weight_OD.detach().float()
    whole = columns // size * size
    slabs = [(weight_OD[:, :whole], size)] + ([(weight_OD[:, whole:], columns - whole)] if whole < columns else [])
    parts = []
    for slab_OC, width in slabs:
        code_NS, scale_N1, zero_N1 = solve(slab_OC.reshape(-1, width))
        parts.append((code_NS.to(torch.uint8).view(rows, -1), scale_N1.view(rows, -1), zero_N1.view(rows, -1)))
    code_OD, scale_OG, zero_OG = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
    return Groups(code_OD, scale_OG, zero_OG, size)
