"""Shape bucketing: products of a CPU in 16 bits, in few shapes.

oneDNN compiles a product anew for every shape: 2 to 20 ms and 0.4 MB each, kept for the last 1,024 of them. A step of
training has two dozen for every number of rows, and no two steps the same number. So numbers of rows are rounded up.
Rows added to a stream are a document of nobody's; rows added to one slot's are its neighbors', of which nothing is
kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def bucketed_rows(rows: int) -> int:
    """`rows` rounded up: to 2^k or 3 * 2^k up to 64, to multiples of 32 beyond, of 64 beyond 2,048."""
    if rows > 64:
        multiple = 64 if rows > 2048 else 32
        return -(-rows // multiple) * multiple
    power = 1 << max(0, rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


def needs_bucketing(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products here are compiled for their shape."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RowBucket:
    """The rows [start, stop) in which the rows [first, end) of one slot are multiplied."""

    first: int
    end: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Rows `start` to `stop` of the stream, the filler around the slot's own rows among them."""
        return slice(self.start, self.stop)

    @property
    def is_exact(self) -> bool:
        """No rows but the slot's."""
        return self.start == self.first and self.stop == self.end

    @property
    def inside(self) -> slice:
        """Where the slot's rows are in it."""
        return slice(self.first - self.start, self.end - self.start)

    def zero_other_rows(self, x_PR: torch.Tensor) -> torch.Tensor:
        """`x_PR`, whose other rows are made zero in place."""
        for rows in self._filler():
            x_PR[rows.start - self.start : rows.stop - self.start].zero_()
        return x_PR

    def add(self, y_TO: torch.Tensor, h_PR: torch.Tensor, B_RO: torch.Tensor, scale: float) -> None:
        """y += scale * h B on the slot's rows; the other rows stay as they are, to the bit."""
        others = [(y_TO[rows], y_TO[rows].clone()) for rows in self._filler()]
        y_TO[self.rows].addmm_(h_PR, B_RO, alpha=scale)
        for filler, values in others:
            filler.copy_(values)

    def _filler(self) -> list[slice]:
        """The rows of the stream before and behind the slot's own, where there are any."""
        around = slice(self.start, self.first), slice(self.end, self.stop)
        return [rows for rows in around if rows.start < rows.stop]

    def contract(self, x_PR: torch.Tensor, y_PD: torch.Tensor) -> torch.Tensor:
        """x^T y over the slot's rows. One of the two is zero in all others; that the other one may not be finite there
        is nothing to this slot."""
        if self.is_exact:
            return x_PR.t() @ y_PD
        return _finite_product(x_PR, y_PD, self.inside.start, self.inside.stop)


FINITE_PRODUCT = "lowrank::finite_product"
"""An operator of its own, since it reads a number: who computes without numbers registers what it gives then."""


@torch.library.custom_op(FINITE_PRODUCT, mutates_args=())
def _finite_product(x_PR: torch.Tensor, y_PD: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """x^T y; over the rows [first, end) alone where the others make it something else than finite."""
    found_RD = x_PR.t() @ y_PD
    if math.isfinite(float(found_RD.sum(dtype=torch.float32))):
        return found_RD
    return x_PR[first:end].t() @ y_PD[first:end]


def row_bucket(x_TD: torch.Tensor, first: int, end: int) -> RowBucket:
    """Where the rows [first, end) of `x_TD` are multiplied."""
    rows = end - first
    if needs_bucketing(x_TD.device, x_TD.dtype):
        rows = min(bucketed_rows(rows), len(x_TD))
    start = min(first, len(x_TD) - rows)
    return RowBucket(first, end, start, start + rows)
