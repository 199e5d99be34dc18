"""Causal attention of a packed stream of documents on a CPU, with a backward pass of plain matrix products.

torch's fused attention is fast forward on a CPU, but its bf16 backward pass on sequences of a few
hundred tokens costs four to six times what the five matrix products in it cost (docs/log.md). So the
forward pass is torch's, and the backward pass computes the probabilities again and multiplies, a block
of queries at a time, with the keys that block can see.

A score of 60 rounded to bf16 is off by 0.1, its probability by 10 %, and trained models have such scores
(Qwen 2.5's keys have large biases). So the logarithm of the softmax's sum, which the forward pass gives,
is subtracted inside the matrix product, before anything is rounded: two more columns, its high and its low part.

Documents of about the same length go together. Lengths are rounded up to a multiple of 32: padding
behind a document is invisible to it under a causal mask, and the CPU's bf16 kernels, which are compiled
anew for every shape, see few shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowrank.kernels.precision import float32_or_wider

_MULTIPLE = 32
_BLOCK = 128
"""Queries of a document whose probabilities are computed together in the backward pass."""
_BLOCK_ELEMENTS = 8 << 20
"""Probabilities alive at a time."""


@dataclass(frozen=True)
class _Padded:
    """Documents of one padded length each next to each other: P rows, in `groups` of (first row, N documents, L)."""

    num_rows: int
    place_T: torch.Tensor
    """The row of each token of the stream."""
    groups: tuple[tuple[int, int, int], ...]

    def pad(self, x_THd: torch.Tensor) -> torch.Tensor:
        """(T, H, d) -> (P, H, d), zeros behind each document."""
        return x_THd.new_zeros(self.num_rows, *x_THd.shape[1:]).index_copy_(0, self.place_T, x_THd)

    def documents(self, x_PHd: torch.Tensor) -> list[torch.Tensor]:
        """Views (N, H, L, d) of the groups."""
        return [
            x_PHd[first : first + num * length].view(num, length, *x_PHd.shape[1:]).transpose(1, 2)
            for first, num, length in self.groups
        ]


def short_attention(
    q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, lengths: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Causal softmax(q k^T * scale) v within each document of the stream: (T, H, d); G divides H."""
    return _ShortAttention.apply(q_THd, k_TGd, v_TGd, _padded(lengths), scale)


def _padded(lengths: tuple[int, ...]) -> _Padded:
    length_D = np.array(lengths)
    padded_D = -(-length_D // _MULTIPLE) * _MULTIPLE
    start_D, groups, row = np.empty_like(length_D), [], 0
    for padded in dict.fromkeys(padded_D.tolist()):
        members = np.flatnonzero(padded_D == padded)
        groups.append((row, len(members), padded))
        start_D[members] = row + padded * np.arange(len(members))
        row += padded * len(members)
    first_D = np.cumsum(length_D) - length_D
    place_T = np.arange(length_D.sum()) + np.repeat(start_D - first_D, length_D)
    return _Padded(row, torch.tensor(place_T), tuple(groups))


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, layout: _Padded, scale: float
    ) -> torch.Tensor:
        padded = [layout.pad(tensor) for tensor in (q_THd, k_TGd, v_TGd)]
        output_PHd = torch.empty_like(padded[0])
        wide = float32_or_wider(q_THd.dtype)
        lse_PH = output_PHd.new_empty(output_PHd.shape[:2], dtype=wide)
        for q, k, v, output, lse in zip(*map(layout.documents, (*padded, output_PHd, lse_PH))):
            fold = q.shape[1] // k.shape[1]
            k, v = (each.repeat_interleave(fold, dim=1) if fold > 1 else each for each in (k, v))
            # what F.scaled_dot_product_attention calls on a CPU, which keeps the second result to itself
            results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
            output.copy_(results[0])
            lse.copy_(results[1])
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, lse_PH)
        return output_PHd.index_select(0, layout.place_T)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        layout: _Padded = ctx.layout
        *inputs, lse_PH = ctx.saved_tensors
        padded = [layout.pad(tensor) for tensor in (*inputs, outer[0])]
        gradients = [torch.empty_like(tensor) for tensor in padded[:3]]
        for q, k, v, d_output, lse, dq, dk, dv in zip(*map(layout.documents, (*padded, lse_PH, *gradients))):
            at_once = max(1, _BLOCK_ELEMENTS // (q.shape[1] * min(_BLOCK, q.shape[2]) * q.shape[2]))
            for first in range(0, len(q), at_once):
                rows = slice(first, first + at_once)
                parts = _backward(q[rows], k[rows], v[rows], d_output[rows], lse[rows], ctx.scale)
                dq[rows], dk[rows], dv[rows] = parts
        return *(tensor.index_select(0, layout.place_T) for tensor in gradients), None, None


def _backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_output: torch.Tensor, lse: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The softmax's gradient written out, (N, H, L, d). Query heads that share a key head become its M rows.

    `lse` (N, H, L): the logarithm of each softmax's sum.
    """
    num, heads, length, width = q.shape
    groups, fold = num * k.shape[1], heads // k.shape[1]
    q_NFLd, d_NFLd = (each.reshape(groups, fold, length, width) for each in (q, d_output))
    k_NLd, v_NLd = (tensor.reshape(groups, length, width) for tensor in (k, v))
    power = 2.0 ** round(math.log2(scale))  # what can be multiplied into q without rounding
    rest = scale / power
    less_NFL1 = -lse.reshape(groups, fold, length, 1) / rest
    high_NFL1 = less_NFL1.to(q.dtype)
    low_NFL1 = (less_NFL1 - high_NFL1).to(q.dtype)
    q_NFLw = torch.cat([q_NFLd * power, high_NFL1, low_NFL1], dim=-1)
    k_NLw = torch.cat([k_NLd, k_NLd.new_ones(groups, length, 2)], dim=-1)
    wide = float32_or_wider(q.dtype)
    dq_NFLd = torch.empty_like(q_NFLd)
    dk_NLd, dv_NLd = (torch.zeros_like(k_NLd, dtype=wide) for _ in range(2))  # sums over blocks
    for first in range(0, length, _BLOCK):
        end = min(first + _BLOCK, length)
        q_NMw, d_NMd = (each[:, :, first:end].flatten(1, 2) for each in (q_NFLw, d_NFLd))
        q_NMd = q_NMw[..., :width]
        keys, values = k_NLd[:, :end], v_NLd[:, :end]
        share = torch.bmm(q_NMw, k_NLw[:, :end].transpose(1, 2))
        hidden = torch.full((end - first, end - first), float("-inf"), dtype=q.dtype).triu_(1)
        share.view(groups, fold, end - first, end)[..., first:] += hidden
        if rest != 1.0:
            share.mul_(rest)
        share.exp_()
        d_share = torch.bmm(d_NMd, values.transpose(1, 2))
        d_score = torch.ops.aten._softmax_backward_data(d_share, share, -1, q.dtype)
        dq_NFLd[:, :, first:end] = torch.bmm(d_score, keys).mul_(scale).view(groups, fold, end - first, width)
        dk_NLd[:, :end] += torch.bmm(d_score.transpose(1, 2), q_NMd)
        dv_NLd[:, :end] += torch.bmm(share.transpose(1, 2), d_NMd)
    return dq_NFLd.view_as(q), dk_NLd.mul_(rest).view_as(k), dv_NLd.view_as(v)
