"""Rewards that a reward model gives to answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowrank.adapters.bank import Bank
from lowrank.batches import pack
from lowrank.kernels.value_head import last_token_values
from lowrank.models.base import Base
from lowrank.segments import Segment


@torch.no_grad()
def rewards(base: Base, bank: Bank, scored: Sequence[tuple[int, torch.Tensor, Segment]]) -> list[float]:
    """The reward of each `(slot, value_D, segment)`, in order. One forward pass each: an evaluation, not training."""
    found = []
    for slot, value_D, segment in scored:
        batch = pack([(slot, bank.with_virtual_tokens(slot, segment))]).to(base.device)
        found.append(float(last_token_values(bank.hidden(batch), batch.start_S1, value_D.to(base.device))[0]))
    return found
