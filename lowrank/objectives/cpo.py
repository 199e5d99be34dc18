"""Contrastive preference optimization (arXiv:2401.08417): DPO with a uniform reference, and SFT on the chosen."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics, Objective, ObjectiveSettings
from lowrank.objectives.sequence_loss import (
    chosen_nll,
    count_pairs,
    pair_metrics,
    pairs_of,
    per_segment,
    preference_loss,
    tokens_per_segment,
)
from lowrank.records import Preference


class CPOConfig(ObjectiveSettings):
    """Preference pairs without a reference: chosen answers above rejected ones, and learned as in SFT."""

    paper = "arXiv:2401.08417"
    when = "pairs whose chosen answers are worth learning as they are (translation)"
    type: Literal["cpo"] = "cpo"
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """As in dpo."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of the log-probabilities that are compared."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs assumed to be labeled the wrong way round; only with sigmoid."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the plain SFT loss on the chosen answers."""

    def build(self) -> Objective:
        """A `CPO` of these settings, for one job: the engine calls its `count` and `loss`."""
        return CPO(self)


class CPO:
    """Mean over pairs of `preference_loss(log p of chosen - log p of rejected)`, plus alpha times the NLL of chosen."""

    record = Preference

    def __init__(self, config: CPOConfig) -> None:
        self.config = config

    def count(self, batch: Batch) -> Totals:
        """Pairs, and tokens of their answers."""
        return count_pairs(batch)

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class. IPO's log-probabilities are means over tokens, the others' sums (as in TRL)."""
        config, pairs = self.config, pairs_of(batch)
        logp_S = per_segment(scores.logprob_T, batch)
        compared_S = logp_S / tokens_per_segment(batch, logp_S.dtype) if config.loss_type == "ipo" else logp_S
        compared = pairs.of(compared_S)
        losses_P = preference_loss(compared[0] - compared[1], config.loss_type, config.beta, config.label_smoothing)
        loss = losses_P.sum() / max(totals["pairs"], 1.0) + config.alpha * chosen_nll(pairs.of(logp_S)[0], totals)
        rewards = (config.beta * compared[0], config.beta * compared[1])
        return loss, pair_metrics(rewards, compared, totals)
