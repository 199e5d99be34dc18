"""Causal attention of many short sequences on a CPU, with a backward pass of plain matrix products.

torch's fused attention is fast forward on a CPU, but its bf16 backward pass on sequences of a few
hundred tokens costs four to six times what the five matrix products in it cost (docs/log.md). So the
forward pass is torch's, and the backward pass computes the probabilities again and multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

LONGEST = 512
"""Beyond this length torch's own backward pass is as fast, and the probabilities grow with the square."""
_BLOCK_ELEMENTS = 8 << 20
"""Probabilities alive at a time."""


def short_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal softmax(q k^T * scale) v: (N, H, L, d), (N, G, L, d), (N, G, L, d) -> (N, H, L, d); G divides H."""
    return _ShortAttention.apply(q, k, v, scale)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        output = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, output)
        return output

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        q, k, v, output = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        at_once = max(1, _BLOCK_ELEMENTS // (q.shape[1] * q.shape[2] ** 2))
        for first in range(0, len(q), at_once):
            rows = slice(first, first + at_once)
            parts = _backward(q[rows], k[rows], v[rows], output[rows], outer[0][rows], ctx.scale)
            dq[rows], dk[rows], dv[rows] = parts
        return dq, dk, dv, None


def _backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, d_output: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The softmax's gradient written out. Query heads that share a key head are folded into its rows (M = H/G * L)."""
    num, heads, length, width = q.shape
    groups, fold = num * k.shape[1], heads // k.shape[1]
    q_NMd, d_NMd = (tensor.reshape(groups, fold * length, width) for tensor in (q, d_output))
    k_NLd, v_NLd = (tensor.reshape(groups, length, width) for tensor in (k, v))
    hidden = torch.full((length, length), float("-inf"), dtype=q.dtype).triu_(1)
    score = torch.bmm(q_NMd, k_NLd.transpose(1, 2)).mul_(scale).view(groups, fold, length, length).add_(hidden)
    share = torch.softmax(score, dim=-1).view(groups, fold * length, length)
    # Products in float32: where one key takes nearly all, the difference below is small and would be their rounding.
    wide = torch.promote_types(q.dtype, torch.float32)
    along_NM1 = (output.to(wide) * d_output).sum(-1).to(q.dtype).reshape(groups, fold * length, 1)
    d_score = torch.bmm(d_NMd, v_NLd.transpose(1, 2)).sub_(along_NM1).mul_(share).mul_(scale)
    dq = torch.bmm(d_score, k_NLd).view_as(q)
    dk = torch.bmm(d_score.transpose(1, 2), q_NMd).view_as(k)
    dv = torch.bmm(share.transpose(1, 2), d_NMd).view_as(v)
    return dq, dk, dv
