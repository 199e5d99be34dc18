"""`four_bit.dequantise` on a GPU: each program turns some bytes into twice as many weights. Needs triton."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

_BYTES = 1024


@triton.jit
def _dequantise(packed, absmax, values, out, num_weights, block_size, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = 2 * byte < num_weights
    codes = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + 2 * byte // block_size, mask=inside, other=0.0)  # blocks are even: both weights share it
    high = tl.load(values + (codes >> 4)) * scale
    low = tl.load(values + (codes & 15)) * scale
    tl.store(out + 2 * byte, high.to(out.dtype.element_ty), mask=inside)
    tl.store(out + 2 * byte + 1, low.to(out.dtype.element_ty), mask=2 * byte + 1 < num_weights)


def dequantise_triton(
    packed: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, block_size: int, flat: torch.Tensor
) -> None:
    """Fill `flat` (contiguous, one dimension). `values`: the 16 float32 values of the code, on the same device."""
    grid = (triton.cdiv(len(packed), _BYTES),)
    _dequantise[grid](packed, absmax, values, flat, flat.numel(), block_size, BYTES=_BYTES)  # pyright: ignore[reportArgumentType, reportIndexIssue]
