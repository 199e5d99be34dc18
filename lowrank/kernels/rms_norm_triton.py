"""`rms_norm` on a GPU: a program for each row, one pass over memory in each direction. Needs triton."""

# Triton reads the annotations of a kernel as its types.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from lowrank.kernels.accelerators import on_device_of

_KINDS = {"llama": 0, "olmo2": 1, "gemma": 2}


@triton.jit
def _forward(x, weight, y, inverse, width, eps, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(inverse + row, scale)
    unit = value * scale
    if KIND == 0:  # rounded before the weight comes on
        unit = unit.to(x.dtype.element_ty).to(tl.float32)
    if KIND == 2:
        factor += 1.0
    tl.store(y + row * width + column, (factor * unit).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(x, weight, dy, inverse, dx, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(inverse + row)
    unit = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32) * scale
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == 2:
        factor += 1.0
    inner = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32) * factor
    share = tl.sum(inner * unit, 0) / width
    tl.store(dx + row * width + column, ((inner - unit * share) * scale).to(dx.dtype.element_ty), mask=inside)


def forward_triton(
    x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float, kind: str, y_ND: torch.Tensor, inverse_N1: torch.Tensor
) -> None:
    """Fill `y_ND` and 1 / rms of each row. All contiguous but for what is read."""
    x_ND, weight_D = x_ND.contiguous(), weight_D.contiguous()
    run: Any = _forward[(len(x_ND),)]  # pyright: ignore[reportIndexIssue]
    with on_device_of(x_ND):
        run(x_ND, weight_D, y_ND, inverse_N1, x_ND.shape[1], eps, KIND=_KINDS[kind], **_shape(x_ND.shape[1]))


def backward_triton(
    x_ND: torch.Tensor,
    weight_D: torch.Tensor,
    dy_ND: torch.Tensor,
    inverse_N1: torch.Tensor,
    kind: str,
    dx_ND: torch.Tensor,
) -> None:
    """Fill `dx_ND`."""
    x_ND, weight_D, dy_ND = x_ND.contiguous(), weight_D.contiguous(), dy_ND.contiguous()
    run: Any = _backward[(len(x_ND),)]  # pyright: ignore[reportIndexIssue]
    with on_device_of(x_ND):
        run(x_ND, weight_D, dy_ND, inverse_N1, dx_ND, x_ND.shape[1], KIND=_KINDS[kind], **_shape(x_ND.shape[1]))


def _shape(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512)), "enable_fp_fusion": False}
