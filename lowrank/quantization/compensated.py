"""GPTQ: round a matrix column by column, and let the columns to come make up for each error.

Frantar et al. 2022 (arXiv:2210.17323). What is kept small is |(W - Q) X|^2 over inputs X that were seen, which needs of
them only the second moments H = X X^T (D, D). Where nothing was seen, weights are rounded to the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lowrank.kernels.accelerators import wide
from lowrank.quantization.groups import Groups

_DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it."""
_COLUMNS = 128
"""Columns whose errors are passed on together to all that follow."""
_SHRINK = tuple(1.0 - 0.02 * step for step in range(16))
"""Scales tried, as shares of the one that spans a group: a few clipped weights often cost less than wide steps."""


class Grid(Protocol):
    """The values a group can take."""

    def fit(self, weight_OS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """scale (O, 1) and zero (O, 1) for groups of S weights."""
        ...

    def code(self, weight_OS: torch.Tensor, scale_O1: torch.Tensor, zero_O1: torch.Tensor) -> torch.Tensor:
        """The nearest values' numbers, (O, S) uint8."""
        ...

    def value(self, code_OS: torch.Tensor, scale_O1: torch.Tensor, zero_O1: torch.Tensor) -> torch.Tensor:
        """What the numbers stand for, float32."""
        ...


@dataclass(frozen=True)
class Even:
    """Integers: (code - zero) * scale. Scales are rounded to `dtype` before anything is rounded to them."""

    bits: int
    symmetric: bool = True
    """The zero in the middle; otherwise an integer of each group's own, 1 at the least (GPTQ's files hold zero - 1)."""
    dtype: torch.dtype = torch.float16

    def fit(self, weight_OS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of `_SHRINK`, by squared error."""
        top, half = (1 << self.bits) - 1, 1 << (self.bits - 1)
        least_O1 = weight_OS.amin(dim=1, keepdim=True).clamp(max=0)
        if self.symmetric:
            whole_O1 = weight_OS.abs().amax(dim=1, keepdim=True) / max(0.5, half - 1)
        else:
            whole_O1 = (weight_OS.amax(dim=1, keepdim=True).clamp(min=0) - least_O1) / top
        least_error_O1 = torch.full_like(whole_O1, torch.inf)
        best_O1, best_zero_O1 = torch.ones_like(whole_O1), torch.full_like(whole_O1, half)
        for share in _SHRINK:
            scale_O1 = (whole_O1 * share).to(self.dtype).float()
            scale_O1 = torch.where(scale_O1 == 0, torch.finfo(self.dtype).tiny, scale_O1)
            zero_O1 = torch.full_like(scale_O1, half)
            if not self.symmetric:
                zero_O1 = torch.round(-least_O1 * share / scale_O1).clamp(1, top)
            error_OS = weight_OS - self.value(self.code(weight_OS, scale_O1, zero_O1), scale_O1, zero_O1)
            error_O1 = error_OS.square().sum(dim=1, keepdim=True)
            better_O1 = error_O1 < least_error_O1
            least_error_O1 = torch.where(better_O1, error_O1, least_error_O1)
            best_O1 = torch.where(better_O1, scale_O1, best_O1)
            best_zero_O1 = torch.where(better_O1, zero_O1, best_zero_O1)
        return best_O1, best_zero_O1

    def code(self, weight_OS: torch.Tensor, scale_O1: torch.Tensor, zero_O1: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        return (torch.round(weight_OS / scale_O1) + zero_O1).clamp_(0, (1 << self.bits) - 1).to(torch.uint8)

    def value(self, code_OS: torch.Tensor, scale_O1: torch.Tensor, zero_O1: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        return (code_OS.float() - zero_O1) * scale_O1


@dataclass(frozen=True)
class Levels:
    """Uneven levels between -1 and 1 (NF4), times the largest weight of the group."""

    levels: torch.Tensor
    """Ascending, float32."""

    def fit(self, weight_OS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest; there is no zero point."""
        scale_O1 = weight_OS.abs().amax(dim=1, keepdim=True)
        return scale_O1, torch.zeros_like(scale_O1)

    def code(self, weight_OS: torch.Tensor, scale_O1: torch.Tensor, zero_O1: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        del zero_O1
        between = (self.levels[1:] + self.levels[:-1]) / 2
        share_OS = weight_OS / torch.where(scale_O1 == 0, 1.0, scale_O1)
        return torch.bucketize(share_OS.contiguous(), between.to(weight_OS.device)).to(torch.uint8)

    def value(self, code_OS: torch.Tensor, scale_O1: torch.Tensor, zero_O1: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        del zero_O1
        return self.levels.to(code_OS.device)[code_OS.long()] * scale_O1


def quantize_matrix(
    weight_OD: torch.Tensor, grid: Grid, group_size: int, moment_DD: torch.Tensor | None = None
) -> tuple[Groups, torch.Tensor]:
    """Codes with their groups, and the values they stand for, (O, D) float32. `group_size` divides D.

    `moment_DD`: mean of x x^T over inputs of the layer; None: rounded to the nearest.
    """
    rows, columns = weight_OD.shape
    assert columns % group_size == 0, (columns, group_size)
    left_OD = weight_OD.detach().float().clone()
    inverse_DD = None if moment_DD is None else _factor_of_inverse(moment_DD.to(left_OD.device))
    code_OD = torch.empty(rows, columns, dtype=torch.uint8, device=left_OD.device)
    value_OD = torch.empty_like(left_OD)
    scales, zeros = [], []
    width = group_size if inverse_DD is None else _width(group_size, columns)
    for first in range(0, columns, width):
        end = min(first + width, columns)
        error_OW = torch.zeros(rows, end - first, device=left_OD.device)
        step = end - first if inverse_DD is None else 1
        for column in range(first, end, step):
            if column % group_size == 0:
                scale_O1, zero_O1 = grid.fit(left_OD[:, column : column + group_size])
                scales.append(scale_O1)
                zeros.append(zero_O1)
            now = slice(column, column + step)
            code_OD[:, now] = grid.code(left_OD[:, now], scales[-1], zeros[-1])
            value_OD[:, now] = grid.value(code_OD[:, now], scales[-1], zeros[-1])
            if inverse_DD is not None:
                error_O = (left_OD[:, column] - value_OD[:, column]) / inverse_DD[column, column]
                left_OD[:, column:end] -= error_O[:, None] * inverse_DD[column, column:end]
                error_OW[:, column - first] = error_O
        if inverse_DD is not None and end < columns:
            left_OD[:, end:] -= error_OW @ inverse_DD[first:end, end:]
    return Groups(code_OD, torch.cat(scales, 1), torch.cat(zeros, 1), group_size), value_OD


def _width(group_size: int, columns: int) -> int:
    """Columns handled together: whole groups, so that a group's scale sees what earlier errors made of it."""
    if group_size >= _COLUMNS:
        return group_size if group_size < columns else _COLUMNS
    return _COLUMNS // group_size * group_size


def _factor_of_inverse(moment_DD: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H^-1; more is added to the diagonal where H is not positive definite."""
    moment_DD = wide(moment_DD).clone()
    diagonal_D = moment_DD.diagonal()
    diagonal_D[diagonal_D == 0] = 1.0  # an input that is always zero: no error of it counts
    step = diagonal_D.mean()
    for damping in (_DAMPING, 0.1, 1.0, 10.0):
        damped_DD = moment_DD + damping * step * torch.eye(
            len(moment_DD), dtype=moment_DD.dtype, device=moment_DD.device
        )
        lower_DD, problem = torch.linalg.cholesky_ex(damped_DD)
        if problem:
            continue
        upper_DD, problem = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_DD), upper=True)
        if not problem:
            return upper_DD.float()
    raise AssertionError("a matrix of second moments is positive semi-definite")
