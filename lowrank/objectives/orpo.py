"""Odds ratio preference optimization (arXiv:2403.07691): SFT and preference in one, without a reference."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics, Objective, ObjectiveSettings
from lowrank.objectives.sequence_loss import (
    chosen_nll,
    count_pairs,
    pair_metrics,
    pairs_of,
    per_segment,
    tokens_per_segment,
)
from lowrank.records import Preference


class ORPOConfig(ObjectiveSettings):
    """Preference pairs without a reference: learn the chosen answers, and raise their odds over the rejected ones."""

    paper = "arXiv:2403.07691"
    when = "pairs, in one go from a base that was never tuned"
    type: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio beside the SFT loss (lambda in the paper)."""

    def build(self) -> Objective:
        """An `ORPO` of these settings, for one job: the engine calls its `count` and `loss`."""
        return ORPO(self.beta)


class ORPO:
    """NLL of the chosen answers per token, plus beta times the mean over pairs of - log sigmoid(log odds ratio).

    Probabilities are per token (geometric means), as in the paper. The NLL is the answer's; TRL's has the prompt too.
    """

    record = Preference

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def count(self, batch: Batch) -> Totals:
        """Pairs, and tokens of their answers."""
        return count_pairs(batch)

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class."""
        pairs = pairs_of(batch)
        logp_S = per_segment(scores.logprob_T, batch)
        means = pairs.of(logp_S / tokens_per_segment(batch, logp_S.dtype))
        ratio_P = F.logsigmoid(_log_odds(means[0]) - _log_odds(means[1]))
        share = -ratio_P.sum() / max(totals["pairs"], 1.0)
        loss = chosen_nll(pairs.of(logp_S)[0], totals) + self.beta * share
        metrics = pair_metrics((self.beta * means[0], self.beta * means[1]), means, totals)
        return loss, metrics | {"log_odds_ratio": -share.detach()}


def _log_odds(logp: torch.Tensor) -> torch.Tensor:
    """log p - log(1 - p). A token that is certain has infinite odds: p stays a rounding error below 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near = logp > -0.6931471805599453  # each form where it does not cancel
    far_term = torch.log1p(-torch.exp(torch.where(near, -1.0, logp)))
    near_term = torch.log(-torch.expm1(torch.where(near, logp, -0.5)))
    return logp - torch.where(near, near_term, far_term)
