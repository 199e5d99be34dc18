"""LoRA while decoding on a GPU: two launches for the rows of any number of slots. Needs triton.

Each row fetches the A and B of its own slot, so nobody has to know which rows are whose before the launch (Punica's
BGMV, arXiv:2310.18547). The first product is cut into parts of the width, which the second one adds up in order: one
row alone would keep a single multiprocessor busy.
"""

# Triton reads the annotations of a kernel as its types.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from lowrank.kernels.accelerators import on_device_of

_TILE = 4096
"""Elements of A or B that a program holds at once."""
_PARTS = 8


@triton.jit
def _shrink(
    x, A, scale, group, h, rows, width, rank, part_width,
    RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    own = tl.load(group + row).to(tl.int64)
    if own >= 0:
        r = tl.arange(0, RANK)
        total = tl.zeros((RANK,), dtype=tl.float32)
        for first in range(0, part_width, BLOCK):
            column = part * part_width + first + tl.arange(0, BLOCK)
            inside = (column < width) & (first + tl.arange(0, BLOCK) < part_width)
            value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
            place = (own * rank + r[:, None]) * width + column[None, :]
            a = tl.load(A + place, mask=(r[:, None] < rank) & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(a * value[None, :], 1)
        tl.store(h + (part * rows + row) * RANK + r, total * tl.load(scale + own).to(tl.float32))


@triton.jit
def _expand(
    h, B, group, y, rows, height, rank, parts,
    RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(group + row).to(tl.int64)
    if own >= 0:
        r = tl.arange(0, RANK)
        total = tl.zeros((RANK,), dtype=tl.float32)
        for part in range(parts):
            total += tl.load(h + (part * rows + row) * RANK + r)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < height
        place = (own * height + column[:, None]) * rank + r[None, :]
        b = tl.load(B + place, mask=inside[:, None] & (r[None, :] < rank), other=0.0).to(tl.float32)
        before = tl.load(y + row * height + column, mask=inside, other=0.0).to(tl.float32)
        update = tl.sum(b * total[None, :], 1)
        tl.store(y + row * height + column, (before + update).to(y.dtype.element_ty), mask=inside)


def add_updates_triton(
    x_TD: torch.Tensor,
    y_TO: torch.Tensor,
    A_GRD: torch.Tensor,
    B_GOR: torch.Tensor,
    scale_G: torch.Tensor,
    group_T: torch.Tensor,
) -> None:
    """Add to each row of `y_TO` (contiguous), in place, the update of its group (-1: none). Sums are float32."""
    rows, width = x_TD.shape
    rank, height = A_GRD.shape[1], y_TO.shape[1]
    assert y_TO.is_contiguous()
    assert len(group_T) == rows, "a row without a group would read foreign memory"
    if not rows or not len(A_GRD):
        return
    padded = triton.next_power_of_2(rank)
    block = max(16, _TILE // padded)
    parts = min(_PARTS, triton.cdiv(width, block))
    h_PTR = torch.empty(parts, rows, padded, dtype=torch.float32, device=x_TD.device)
    shape = {"RANK": padded, "BLOCK": block, "num_warps": 4}
    first: Any = _shrink[(rows, parts)]  # pyright: ignore[reportIndexIssue]
    then: Any = _expand[(rows, triton.cdiv(height, block))]  # pyright: ignore[reportIndexIssue]
    with on_device_of(y_TO):
        first(
            x_TD.contiguous(), A_GRD.contiguous(), scale_G, group_T, h_PTR,
            rows, width, rank, triton.cdiv(width, parts), **shape,
        )  # fmt: skip
        then(h_PTR, B_GOR.contiguous(), group_T, y_TO, rows, height, rank, parts, **shape)
