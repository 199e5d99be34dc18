"""Simple preference optimization (arXiv:2405.14734): length-normalized, with a margin, without a reference."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics, Objective, ObjectiveSettings
from lowrank.objectives.sequence_loss import count_pairs, pair_metrics, pairs_of, per_segment, tokens_per_segment
from lowrank.records import Preference


class SimPOConfig(ObjectiveSettings):
    """Preference pairs without a reference: mean log-probabilities, chosen above rejected by a margin."""

    paper = "arXiv:2405.14734"
    when = "pairs, where answers grow too long with dpo"
    type: Literal["simpo"] = "simpo"
    beta: float = Field(default=0.1, gt=0)
    """Scale of the rewards. 0.1 is TRL's and LLaMA-Factory's default; the paper uses 2 to 2.5."""
    gamma: float = Field(default=0.5, ge=0)
    """The margin, in units of rewards; the paper uses 0.3 to 1.6."""

    def build(self) -> Objective:
        """A `SimPO` of these settings, for one job: the engine calls its `count` and `loss`."""
        return SimPO(self.beta, self.gamma)


class SimPO:
    """Mean over pairs of - log sigmoid(beta (mean log p of chosen - mean log p of rejected) - gamma)."""

    record = Preference

    def __init__(self, beta: float, gamma: float) -> None:
        self.beta, self.gamma = beta, gamma

    def count(self, batch: Batch) -> Totals:
        """Pairs, and tokens of their answers."""
        return count_pairs(batch)

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class."""
        logp_S = per_segment(scores.logprob_T, batch)
        means = pairs_of(batch).of(logp_S / tokens_per_segment(batch, logp_S.dtype))
        rewards = (self.beta * means[0], self.beta * means[1])
        losses_P = -F.logsigmoid(rewards[0] - rewards[1] - self.gamma)
        return losses_P.sum() / max(totals["pairs"], 1.0), pair_metrics(rewards, means, totals)
