"""`four_bit.dequantize` on a GPU: each program turns some bytes into twice as many weights. Needs triton."""

# Triton reads the annotations of a kernel as its types.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from lowrank.kernels.accelerators import on_device_of

_BYTES = 1024


@triton.jit
def _dequantize(packed, absmax, values, out, num_weights, block_size, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = 2 * byte < num_weights
    codes = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + 2 * byte // block_size, mask=inside, other=0.0)  # blocks are even: both weights share it
    high = tl.load(values + (codes >> 4)) * scale
    low = tl.load(values + (codes & 15)) * scale
    tl.store(out + 2 * byte, high.to(out.dtype.element_ty), mask=inside)
    tl.store(out + 2 * byte + 1, low.to(out.dtype.element_ty), mask=2 * byte + 1 < num_weights)


def dequantize_triton(
    packed: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, block_size: int, flat: torch.Tensor
) -> None:
    """Fill `flat` (contiguous, one dimension). `values`: the 16 float32 values of the code, on the same device."""
    packed, absmax = packed.contiguous(), absmax.contiguous()
    grid = (triton.cdiv(len(packed), _BYTES),)
    run: Any = _dequantize[grid]  # pyright: ignore[reportIndexIssue]
    with on_device_of(flat):
        run(packed, absmax, values, flat, flat.numel(), block_size, BYTES=_BYTES, enable_fp_fusion=False)


@triton.jit
def _product(
    x, packed, absmax, values, out, rows, width, height, block_size,
    ROWS: tl.constexpr, OUT: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * OUT + tl.arange(0, OUT)
    own, there = row < rows, column < height
    total = tl.zeros((ROWS, OUT), dtype=tl.float32)
    for first in range(0, width // 2, BYTES):
        byte = first + tl.arange(0, BYTES)
        inside = byte < width // 2
        place = column[None, :].to(tl.int64) * (width // 2) + byte[:, None]
        mask = inside[:, None] & there[None, :]
        codes = tl.load(packed + place, mask=mask, other=0).to(tl.int32)
        scale = tl.load(absmax + 2 * place // block_size, mask=mask, other=0.0)
        high = (tl.load(values + (codes >> 4)) * scale).to(x.dtype.element_ty)
        low = (tl.load(values + (codes & 15)) * scale).to(x.dtype.element_ty)
        # A byte holds an even and an odd column of the weight: two products over half of the columns each.
        from_x = x + row[:, None] * width + 2 * byte[None, :]
        even = tl.load(from_x, mask=own[:, None] & inside[None, :], other=0.0)
        odd = tl.load(from_x + 1, mask=own[:, None] & inside[None, :], other=0.0)
        total += tl.dot(even, high) + tl.dot(odd, low)
    tl.store(
        out + row[:, None] * height + column[None, :],
        total.to(out.dtype.element_ty),
        mask=own[:, None] & there[None, :],
    )


_TILE = 16
"""Rows of a tile of the matrix units."""


def product_triton(
    x_ND: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    values: torch.Tensor,
    block_size: int,
    out_NO: torch.Tensor,
) -> None:
    """x W^T of at most 16 rows into `out_NO` (contiguous), W (O, D) in 4 bits with D even; W is nowhere whole.

    As if W were unpacked in the dtype of x and multiplied with sums in float32."""
    rows, width = x_ND.shape
    assert rows <= _TILE
    assert width % 2 == 0
    height = out_NO.shape[1]
    run: Any = _product[(triton.cdiv(height, 64),)]  # pyright: ignore[reportIndexIssue]
    with on_device_of(out_NO):
        run(
            x_ND.contiguous(), packed.contiguous(), absmax.contiguous(), values, out_NO,
            rows, width, height, block_size,
            ROWS=_TILE, OUT=64, BYTES=32, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
