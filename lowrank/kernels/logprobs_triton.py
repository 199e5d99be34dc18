"""`logprobs._score_chunk` on a GPU: a program for each row, which reads the logits twice and writes the gradient in
their place. No float32 copy of a chunk exists. Needs triton."""

# Triton reads the annotations of a kernel as its types.
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from lowrank.kernels.accelerators import on_device_of

_BLOCK = 4096


@triton.jit
def _logit_inline(raw, multiplier, softcap, CAPPED: tl.constexpr):
    """(the logit, its slope), float32."""
    value = raw.to(tl.float32) * multiplier
    if CAPPED:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * value / softcap) + 1.0)
        return softcap * tanh, multiplier * (1.0 - tanh * tanh)
    return value, value * 0.0 + multiplier


@triton.jit
def _score(
    raw, target, logprob, width, multiplier, softcap, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(target + row)
    most = -float("inf")
    total = 0.0
    wanted = 0.0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        logit, _ = _logit_inline(
            tl.load(raw + row * width + column, mask=inside, other=0.0), multiplier, softcap, CAPPED
        )
        logit = tl.where(inside, logit, -float("inf"))
        higher = tl.maximum(most, tl.max(logit, 0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(logit - higher), 0)
        most = higher
        wanted += tl.sum(tl.where(column == own, logit, 0.0), 0)  # pyright: ignore[reportOperatorIssue]
    whole = most + tl.log(total)
    tl.store(logprob + row, wanted - whole)
    if GRADIENT:
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            place = raw + row * width + column
            logit, slope = _logit_inline(tl.load(place, mask=inside, other=0.0), multiplier, softcap, CAPPED)
            gradient = (tl.exp(logit - whole) - tl.where(column == own, 1.0, 0.0)) * slope
            tl.store(place, gradient.to(raw.dtype.element_ty), mask=inside)


def score_triton(
    raw_KV: torch.Tensor,
    target_K: torch.Tensor,
    logprob_K: torch.Tensor,
    multiplier: float,
    softcap: float | None,
    gradient: bool,
) -> None:
    """Fill `logprob_K` (float32); with `gradient`, `raw_KV` (contiguous) becomes minus d log p / d raw."""
    assert raw_KV.is_contiguous()
    run: Any = _score[(len(raw_KV),)]  # pyright: ignore[reportIndexIssue]
    with on_device_of(raw_KV):
        run(
            raw_KV, target_K.contiguous(), logprob_K, raw_KV.shape[1], float(multiplier), float(softcap or 1.0),
            CAPPED=bool(softcap), GRADIENT=gradient, BLOCK=min(_BLOCK, triton.next_power_of_2(raw_KV.shape[1])),
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
