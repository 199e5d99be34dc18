"""Direct preference optimisation (arXiv:2305.18290), with IPO's (arXiv:2310.12036) and the hinge loss.

The reference is the bare base, as in LLaMA-Factory: an adapter that training goes on with is not part of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lowrank.objectives import Metrics, Objective, ObjectiveSettings
from lowrank.objectives.answers import (
    chosen_nll,
    count_pairs,
    pair_metrics,
    pairs_of,
    per_segment,
    preference_loss,
    reference_of,
    tokens_per_segment,
)
from lowrank.records import Batch, Preference, Scores, Totals


class Config(ObjectiveSettings):
    """Preference pairs, compared with what the bare base thinks of them: chosen answers gain on rejected ones."""

    paper = "arXiv:2305.18290"
    when = "pairs of a better and a worse answer; the usual choice"
    type: Literal["dpo"] = "dpo"
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid: DPO. hinge: pairs that are clear enough teach nothing more. ipo: log-probabilities per token, drawn to a
    margin of 1 / (2 beta) instead of ever further apart."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the base; larger stays nearer."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs assumed to be labelled the wrong way round (conservative DPO); only with sigmoid."""
    pref_ftx: float = Field(default=0.0, ge=0)
    """Weight of the plain SFT loss on the chosen answers, added to the preference loss."""

    def build(self) -> Objective:
        """The objective."""
        return DPO(self)


class DPO:
    """Mean over pairs of `preference_loss(log ratio of chosen - log ratio of rejected)`, plus `pref_ftx` times NLL."""

    record = Preference
    needs = ("reference",)

    def __init__(self, config: Config) -> None:
        self.config = config

    def count(self, batch: Batch) -> Totals:
        """Pairs, and tokens of their answers."""
        return count_pairs(batch)

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class. IPO's log-probabilities are means over tokens, the others' sums (as in TRL)."""
        config, pairs = self.config, pairs_of(batch)
        logp_S = per_segment(scores.logprob_T, batch)
        ratio_S = logp_S - per_segment(reference_of(scores, logp_S), batch)
        compared_S = ratio_S / tokens_per_segment(batch, ratio_S.dtype) if config.loss_type == "ipo" else ratio_S
        chosen_P, rejected_P = pairs.of(compared_S)
        losses_P = preference_loss(chosen_P - rejected_P, config.loss_type, config.beta, config.label_smoothing)
        logps = pairs.of(logp_S)
        loss = losses_P.sum() / max(totals["pairs"], 1.0)
        if config.pref_ftx:
            loss = loss + config.pref_ftx * chosen_nll(logps[0], totals)
        return loss, pair_metrics(pairs.of(config.beta * ratio_S), logps, totals)
