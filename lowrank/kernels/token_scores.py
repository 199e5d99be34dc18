"""Scores of tokens that need the whole distribution: chunk by chunk, so that the logits never exist whole.

A chunk's logits are computed again in the backward pass: three GEMMs over the vocabulary, where log-probabilities alone
need two (kernels/logprobs.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from lowrank.kernels.logprobs import Head

_CHUNK_BYTES = 64 << 20

TokenScore = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""`(logits_KV, target_K, reference_KV) -> score_K`, float32; the reference's logits, where there is one."""


def token_scores(
    hidden_KD: torch.Tensor,
    target_K: torch.Tensor,
    head: Head,
    score: TokenScore,
    reference: tuple[torch.Tensor, Head] | None = None,
) -> torch.Tensor:
    """The score of each row: (K, D), (K) -> (K). `reference`: hidden states of the same rows, and their head."""
    each = max(1, _CHUNK_BYTES // (4 * head.weight_VD.shape[0]))

    def piece(part_KD: torch.Tensor, part_K: torch.Tensor, reference_KD: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            reference_KV = None if reference is None or reference_KD is None else reference[1].logits(reference_KD)
        return score(head.logits(part_KD), part_K, reference_KV)

    pieces = []
    for first in range(0, len(hidden_KD), each):
        rows = slice(first, first + each)
        reference_KD = None if reference is None else reference[0][rows]
        part = checkpoint(
            piece, hidden_KD[rows], target_K[rows], reference_KD, use_reentrant=False, preserve_rng_state=False
        )
        assert isinstance(part, torch.Tensor)
        pieces.append(part)
    return torch.cat(pieces) if pieces else hidden_KD.new_zeros(0, dtype=torch.float32)
