"""Evenly spaced levels: integers, by rounding to the nearest.

symmetric: levels -m..m around zero, m = 2^(bits-1) - 1; one scale a group, one level unused.
full range: -2^(bits-1)..m, the largest weight of the group at the end that has one level more.
asymmetric: 2^bits levels from the group's least to its greatest weight; a scale and a zero point.
"""

from __future__ import annotations

import torch

from lowrank.quantization.groups import Groups, in_groups


def symmetric(weight_OD: torch.Tensor, bits: int, group_size: int | None = None, *, full_range: bool = False) -> Groups:
    """Round to the nearest level around zero. Groups of zeros come back as zeros."""
    half = 1 << (bits - 1)

    def solve(weight_NS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if full_range:
            largest_N1 = weight_NS.gather(1, weight_NS.abs().argmax(dim=1, keepdim=True))
            scale_N1 = -largest_N1 / half
        else:
            scale_N1 = weight_NS.abs().amax(dim=1, keepdim=True) / (half - 1)
        level_NS = torch.round(weight_NS / _not_zero(scale_N1)).clamp(-half if full_range else 1 - half, half - 1)
        return level_NS + half, scale_N1, torch.full_like(scale_N1, half)

    return in_groups(weight_OD, group_size, solve)


def asymmetric(weight_OD: torch.Tensor, bits: int, group_size: int | None = None) -> Groups:
    """Round to the nearest of 2^bits levels between the least and the greatest weight, zero among them.

    The zero point is an integer, as GPTQ's and AWQ's files need it.
    """
    top = (1 << bits) - 1

    def solve(weight_NS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        least_N1 = weight_NS.amin(dim=1, keepdim=True).clamp(max=0)
        scale_N1 = (weight_NS.amax(dim=1, keepdim=True).clamp(min=0) - least_N1) / top
        zero_N1 = torch.round(-least_N1 / _not_zero(scale_N1))
        return (torch.round(weight_NS / _not_zero(scale_N1)) + zero_N1).clamp(0, top), scale_N1, zero_N1

    return in_groups(weight_OD, group_size, solve)


def _not_zero(scale_N1: torch.Tensor) -> torch.Tensor:
    return torch.where(scale_N1 == 0, 1.0, scale_N1)
