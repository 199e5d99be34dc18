"""A text as one vector: the last hidden states of a base with an adapter, pooled."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from lowrank.adapters.bank import Bank
from lowrank.batches import pack
from lowrank.generate.request import ContextLengthExceeded, RequestError
from lowrank.models.base import Base
from lowrank.segments import Segment

Pooling = Literal["mean", "last"]


@torch.no_grad()
def embed(base: Base, bank: Bank, slot: int, token_L: np.ndarray, pooling: Pooling) -> np.ndarray:
    """(D) float32 of length 1: the mean over the tokens, or the last one's state.

    Raises RequestError for a text without tokens, beyond the model's reach, or whose numbers are not finite.
    """
    if len(token_L) == 0:
        raise RequestError("the text has no tokens")
    reach = bank.max_positions(slot)
    if reach is not None and len(token_L) > reach:
        raise ContextLengthExceeded(
            f"the text has {len(token_L)} tokens and the model's maximum context length is {reach}"
        )
    segment = bank.with_virtual_tokens(slot, Segment(token_L, np.zeros(len(token_L), np.float32)))
    hidden_TD = bank.hidden(pack([(slot, segment)]).to(base.device))[segment.virtual :].float()
    pooled_D = hidden_TD.mean(0) if pooling == "mean" else hidden_TD[-1]
    vector_D = torch.nn.functional.normalize(pooled_D, dim=0)
    if not bool(vector_D.isfinite().all()):
        raise RequestError("the hidden states are not finite: this adapter, or the base, has diverged")
    return vector_D.cpu().numpy()
