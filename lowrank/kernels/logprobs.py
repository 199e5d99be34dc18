"""Fused log-probabilities (fused linear cross-entropy, cut cross-entropy): never the logits whole.

The gradient of log p_k with respect to hidden row k is a vector that does not depend on what the loss
does with log p_k: (onehot - softmax) W. So the forward pass computes it chunk by chunk, throws the
logits away, and the backward pass is one multiplication per row. Two GEMMs over the vocabulary, no
recomputation, K x D saved, and any loss may be built on top. A head with trainable weights needs the
outer gradient inside a sum over rows, so there the chunks are computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from lowrank.kernels.fused import plain_only, runs_fused
from lowrank.kernels.precision import float32_or_wider
from lowrank.kernels.shape_bucketing import needs_bucketing

_CHUNK_LOGITS = 32 << 20
_BLOCK_BYTES = 2 << 20
"""Logits are made so many at a time: 220 rows of 152 k, beside which reading the weight costs nothing; with 110 the
products are 15 to 20 % slower. On a CPU the softmax walks over them in pieces of `_BLOCK_BYTES` for each thread, which
stay in the cache."""
_MULTIPLE = 16
"""On a CPU in 16 bits the rows of a chunk are a multiple of it: it compiles products for their number of rows, and
computes so many at a time anyway (kernels/shape_bucketing.py)."""


@dataclass(frozen=True)
class Head:
    """The last linear layer: logits = cap(multiplier * (h W^T + b + scale * (h A^T) B^T))."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    multiplier: float = 1.0
    softcap: float | None = None
    """Gemma 2: logits are softcap * tanh(logits / softcap)."""
    low_rank: tuple[torch.Tensor, torch.Tensor, float] | None = None
    """(A_RD, B_VR, scale) of an adapter on the head."""

    @property
    def trainable(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(W, b, A, B), None where there is none."""
        A_RD, B_VR = self.low_rank[:2] if self.low_rank else (None, None)
        return self.weight_VD, self.bias_V, A_RD, B_VR

    def raw(self, hidden_KD: torch.Tensor) -> torch.Tensor:
        """h W^T + b + the adapter's part, in the dtype of `hidden_KD`."""
        logits_KV = F.linear(hidden_KD, self.weight_VD.to(hidden_KD.dtype), _cast(self.bias_V, hidden_KD))
        if self.low_rank:
            A_RD, B_VR, scale = self.low_rank
            logits_KV = torch.addmm(
                logits_KV, hidden_KD @ _cast(A_RD, hidden_KD).t(), _cast(B_VR, hidden_KD).t(), alpha=scale
            )
        return logits_KV

    def logits(self, hidden_KD: torch.Tensor) -> torch.Tensor:
        """The logits themselves, (K, V) in float32 or wider. For a handful of rows."""
        return self.finish(self.raw(hidden_KD))

    def finish(self, raw_KV: torch.Tensor) -> torch.Tensor:
        """The logits of what `raw` gives, in float32 or wider."""
        logits_KV = raw_KV.to(float32_or_wider(raw_KV.dtype)) * self.multiplier
        return self.softcap * torch.tanh(logits_KV / self.softcap) if self.softcap else logits_KV


def logprobs(hidden_KD: torch.Tensor, target_K: torch.Tensor, head: Head) -> torch.Tensor:
    """log p(target) of each row: (K, D), (K) -> (K), float32 (float64 for float64)."""
    rows = len(hidden_KD)
    if rows % _MULTIPLE and needs_bucketing(hidden_KD.device, hidden_KD.dtype):
        hidden_KD = F.pad(hidden_KD, (0, 0, 0, -rows % _MULTIPLE))
        target_K = F.pad(target_K, (0, -rows % _MULTIPLE))
    logprob_K = _LogProbs.apply(hidden_KD, target_K, head, *head.trainable)
    assert isinstance(logprob_K, torch.Tensor)
    return logprob_K[:rows]


def _cast(tensor: Any, like: torch.Tensor) -> Any:
    return None if tensor is None else tensor.to(like.dtype)


def _chunks(hidden_KD: torch.Tensor, vocabulary: int) -> range:
    """Where the chunks start; all of nearly one size, since a GEMM of few rows costs as much as one of many."""
    most = max(1, _CHUNK_LOGITS // vocabulary)
    pieces = max(1, -(-len(hidden_KD) // most))
    each = max(1, -(-len(hidden_KD) // pieces))
    if needs_bucketing(hidden_KD.device, hidden_KD.dtype):
        each += -each % _MULTIPLE
    return range(0, len(hidden_KD), each)


def _blocks(raw_KV: torch.Tensor, wide: torch.dtype) -> range:
    """Where the blocks of a chunk start: one block on a GPU, rows for every thread on a CPU."""
    if raw_KV.device.type != "cpu":
        return range(0, len(raw_KV), max(1, len(raw_KV)))
    each = max(1, _BLOCK_BYTES // (raw_KV.shape[1] * wide.itemsize))
    return range(0, len(raw_KV), each * torch.get_num_threads())


def _score_chunk(raw_KV: torch.Tensor, target_K: torch.Tensor, head: Head, gradient: bool) -> torch.Tensor:
    """log p of the targets; with `gradient`, `raw_KV` is overwritten by MINUS d log p / d raw (a pass less)."""
    wide = float32_or_wider(raw_KV.dtype)
    logprob_K = torch.empty(len(raw_KV), dtype=wide, device=raw_KV.device)
    if raw_KV.is_contiguous() and runs_fused(raw_KV, _check):
        from lowrank.kernels.logprobs_triton import score_triton

        score_triton(raw_KV, target_K, logprob_K, head.multiplier, head.softcap, gradient)
        return logprob_K
    blocks = _blocks(raw_KV, wide)
    for first in blocks:
        rows = slice(first, first + blocks.step)
        logits_KV = raw_KV[rows]
        slope_KV = None
        if head.multiplier != 1.0 or head.softcap:
            logits_KV = logits_KV.to(wide) * head.multiplier
        if head.softcap:
            tanh_KV = torch.tanh(logits_KV / head.softcap)
            slope_KV, logits_KV = 1.0 - tanh_KV * tanh_KV, tanh_KV * head.softcap
        all_KV = torch.log_softmax(logits_KV, dim=-1, dtype=wide)
        column_K1 = target_K[rows, None]
        logprob_K[rows] = all_KV.gather(1, column_K1)[:, 0]
        if gradient:
            gradient_KV = all_KV.exp_()
            gradient_KV.scatter_add_(1, column_K1, torch.full_like(column_K1, -1.0, dtype=wide))
            if slope_KV is not None:
                gradient_KV *= slope_KV
            if head.multiplier != 1.0:
                gradient_KV *= head.multiplier
            raw_KV[rows] = gradient_KV
    return logprob_K


def _check(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the Triton body makes of logits beside what this file makes of them."""
    from lowrank.kernels.logprobs_triton import score_triton

    pairs = []
    for multiplier, softcap in ((1.0, None), (0.5, 20.0)):
        raw_KV = 4 * torch.randn(7, 5000, dtype=dtype, device=device)
        target_K = torch.arange(7, device=device)
        plain_KV, logprob_K = raw_KV.clone(), torch.empty(7, device=device)
        score_triton(raw_KV, target_K, logprob_K, multiplier, softcap, True)
        with plain_only():
            head = Head(raw_KV.new_empty(0, 0), multiplier=multiplier, softcap=softcap)
            plain_K = _score_chunk(plain_KV, target_K, head, True)
        pairs += [(logprob_K, plain_K), (raw_KV, plain_KV)]
    return pairs


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_KD: torch.Tensor, target_K: torch.Tensor, head: Head, *trainable: Any) -> torch.Tensor:
        del trainable
        ctx.head = head
        ctx.head_trains = any(ctx.needs_input_grad[3:])
        gradient = ctx.needs_input_grad[0] and not ctx.head_trains
        gradient_KD = torch.empty_like(hidden_KD) if gradient else None
        pieces = []
        chunks = _chunks(hidden_KD, head.weight_VD.shape[0])
        for first in chunks:
            rows = slice(first, first + chunks.step)
            raw_KV = head.raw(hidden_KD[rows])
            pieces.append(_score_chunk(raw_KV, target_K[rows], head, gradient))
            if gradient_KD is not None:
                gradient_KD[rows] = _to_hidden(raw_KV, head)
        if ctx.head_trains:
            ctx.save_for_backward(hidden_KD, target_K)
        elif gradient:
            ctx.save_for_backward(gradient_KD)
        return torch.cat(pieces) if pieces else hidden_KD.new_zeros(0, dtype=float32_or_wider(hidden_KD.dtype))

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (outer_K,) = outer
        if not ctx.head_trains:
            (gradient_KD,) = ctx.saved_tensors
            return (gradient_KD * -outer_K[:, None]).to(gradient_KD.dtype), *[None] * 6
        hidden_KD, target_K = ctx.saved_tensors
        head: Head = ctx.head
        needs_hidden, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        sums = [torch.zeros_like(t) if need and t is not None else None for t, need in zip(head.trainable, needs)]
        gradient_KD = torch.zeros_like(hidden_KD)
        chunks = _chunks(hidden_KD, head.weight_VD.shape[0])
        for first in chunks:
            rows = slice(first, first + chunks.step)
            raw_KV = head.raw(hidden_KD[rows])
            _score_chunk(raw_KV, target_K[rows], head, gradient=True)
            raw_KV *= -outer_K[rows, None].to(raw_KV.dtype)
            if needs_hidden:
                gradient_KD[rows] = _to_hidden(raw_KV, head)
            _add_head_gradients(sums, raw_KV, hidden_KD[rows], head)
        return gradient_KD if needs_hidden else None, None, None, *sums


def _to_hidden(gradient_KV: torch.Tensor, head: Head) -> torch.Tensor:
    gradient_KD = gradient_KV @ head.weight_VD.to(gradient_KV.dtype)
    if head.low_rank:
        A_RD, B_VR, scale = head.low_rank
        gradient_KD.addmm_(gradient_KV @ _cast(B_VR, gradient_KV), _cast(A_RD, gradient_KV), alpha=scale)
    return gradient_KD


def _add_head_gradients(sums: list[Any], gradient_KV: torch.Tensor, hidden_KD: torch.Tensor, head: Head) -> None:
    """Add one chunk's gradients of (W, b, A, B) to `sums`, in the dtype of the parameters (float32 masters)."""
    weight, bias, sum_A, sum_B = sums
    if weight is not None:
        weight += gradient_KV.t() @ hidden_KD
    if bias is not None:
        bias += gradient_KV.sum(0)
    if head.low_rank and (sum_A is not None or sum_B is not None):
        A_RD, B_VR, scale = head.low_rank
        if sum_A is not None:
            sum_A += scale * ((gradient_KV @ _cast(B_VR, gradient_KV)).t() @ hidden_KD)
        if sum_B is not None:
            sum_B += scale * (gradient_KV.t() @ (hidden_KD @ _cast(A_RD, hidden_KD).t()))
