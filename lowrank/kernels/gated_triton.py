"""`gated` on a GPU: act(gate) * up and both gradients, one pass over memory each. Needs triton."""

# Triton reads the annotations of a kernel as its types.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from lowrank.kernels.accelerators import on_device_of

_BLOCK = 1024
KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


@triton.jit
def _act_inline(g, KIND: tl.constexpr):
    """(act(g), its slope), float32."""
    if KIND == 0:
        gate = 1.0 / (1.0 + tl.exp(-g))
        return g * gate, gate * (1.0 + g * (1.0 - gate))
    if KIND == 1:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
        return 0.5 * g * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * g * (1.0 - tanh * tanh) * slope
    share = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    return g * share, share + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)


@triton.jit
def _forward(gate, up, out, number, KIND: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < number
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    act, _ = _act_inline(g, KIND)
    rounded = act.to(out.dtype.element_ty).to(tl.float32)
    product = rounded * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate, up, dy, dgate, dup, number, KIND: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < number
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    outer = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    act, slope = _act_inline(g, KIND)
    rounded = act.to(dup.dtype.element_ty).to(tl.float32)
    tl.store(dup + place, (rounded * outer).to(dup.dtype.element_ty), mask=inside)
    inner = (outer * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)).to(dgate.dtype.element_ty)
    tl.store(dgate + place, (inner.to(tl.float32) * slope).to(dgate.dtype.element_ty), mask=inside)


def forward_triton(gate: torch.Tensor, up: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """Fill `out` (contiguous), of the shape of both."""
    run: Any = _forward[(triton.cdiv(out.numel(), _BLOCK),)]  # pyright: ignore[reportIndexIssue]
    with on_device_of(gate):
        run(
            gate.contiguous(), up.contiguous(), out, out.numel(), KIND=KINDS[kind], BLOCK=_BLOCK, enable_fp_fusion=False
        )


def backward_triton(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, kind: str, dgate: torch.Tensor, dup: torch.Tensor
) -> None:
    """Fill `dgate` and `dup` (contiguous)."""
    run: Any = _backward[(triton.cdiv(dy.numel(), _BLOCK),)]  # pyright: ignore[reportIndexIssue]
    operands = (gate.contiguous(), up.contiguous(), dy.contiguous(), dgate, dup)
    with on_device_of(gate):
        run(*operands, dy.numel(), KIND=KINDS[kind], BLOCK=_BLOCK, enable_fp_fusion=False)
