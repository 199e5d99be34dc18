"""Supervised fine-tuning: the mean negative log-probability of the tokens that carry weight."""

from __future__ import annotations

from typing import Literal

import torch

from lowrank.objectives import Metrics, Objective, ObjectiveSettings
from lowrank.records import Batch, Conversation, Scores, Totals


class Config(ObjectiveSettings):
    """Supervised fine-tuning on conversations: learn the assistant's turns."""

    when = "the default: answers to learn from"
    type: Literal["sft"] = "sft"

    def build(self) -> Objective:
        """The objective."""
        return TokenLoss(Conversation)


class TokenLoss:
    """loss = - sum_t weight_t log p_t / sum_t weight_t, over the whole optimiser step."""

    def __init__(self, record: type) -> None:
        self.record = record

    def count(self, batch: Batch) -> Totals:
        """Weighted tokens."""
        return {"tokens": float(batch.weight_T.sum())}

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class. A step without a single weighted token has loss 0 and gradient 0, not NaN."""
        return -(batch.weight_T * scores.logprob_T).sum() / max(totals["tokens"], 1e-9), {}
