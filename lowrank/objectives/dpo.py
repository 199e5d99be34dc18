"""Direct preference optimization (arXiv:2305.18290), with IPO's (arXiv:2310.12036) and the hinge loss.

The reference is the bare base, as in LLaMA-Factory: an adapter that training goes on with is not part of it. Another
model may take its place.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics, Need, Objective, ObjectiveSettings
from lowrank.objectives.sequence_loss import (
    Pairs,
    chosen_nll,
    count_pairs,
    pair_metrics,
    pairs_of,
    per_segment,
    preference_loss,
    reference_of,
    tokens_per_segment,
    verbose_weights,
)
from lowrank.records import Preference


class DPOConfig(ObjectiveSettings):
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
    """Share of the pairs assumed to be labeled the wrong way round (conservative DPO); only with sigmoid."""
    pref_ftx: float = Field(default=0.0, ge=0)
    """Weight of the plain SFT loss on the chosen answers, added to the preference loss."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """LD-DPO: weight of an answer's tokens beyond the length of the pair's shorter answer (arXiv:2409.06411); left out
    or 1: all count the same."""
    bco_weight: float = Field(default=0.0, ge=0)
    """Weight of BCO's loss (arXiv:2404.04656) beside the preference loss, as (loss + weight bco) / (1 + weight): it
    tells chosen from rejected answers one by one, by rewards above and below their mean so far. That mean begins anew
    when a run goes on. Costs one more forward pass a step."""
    reference_model: str | None = None
    """A model that answers are compared with, instead of the bare base: a folder or hub name with the same tokens."""

    def build(self) -> Objective:
        """A `DPO` of these settings, for one job: the engine calls its `count` and `loss`."""
        return DPO(self)


class DPO:
    """Mean over pairs of `preference_loss(log ratio of chosen - log ratio of rejected)`, plus `pref_ftx` times NLL."""

    record = Preference
    needs: tuple[Need, ...] = ("reference",)

    def __init__(self, config: DPOConfig) -> None:
        self.config = config
        if config.bco_weight:
            self.needs = ("reference", "observed")
        self._rewards = _MeanOfSteps()

    def count(self, batch: Batch) -> Totals:
        """Pairs, and tokens of their answers."""
        return count_pairs(batch)

    def observe(self, scores: Scores, batch: Batch) -> Totals:
        """Rewards of the step's answers, for BCO's mean."""
        _, ratio_S, _ = self._log_ratios(scores, batch)
        return {"reward_sum": self.config.beta * float(ratio_S.sum()), "rewarded": float(len(ratio_S))}

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class. IPO's log-probabilities are means over tokens, the others' sums (as in TRL)."""
        config = self.config
        logp_S, ratio_S, pairs = self._log_ratios(scores, batch)
        chosen_P, rejected_P = pairs.of(ratio_S)
        losses_P = preference_loss(chosen_P - rejected_P, config.loss_type, config.beta, config.label_smoothing)
        if config.bco_weight:
            mean = self._rewards.after(totals)
            bco_P = -F.logsigmoid(config.beta * chosen_P - mean) - F.logsigmoid(mean - config.beta * rejected_P)
            losses_P = (losses_P + config.bco_weight * bco_P) / (1.0 + config.bco_weight)
        loss = losses_P.sum() / max(totals["pairs"], 1.0)
        if config.pref_ftx:
            loss = loss + config.pref_ftx * chosen_nll(pairs.of(logp_S)[0], totals)
        plain_S = logp_S - per_segment(reference_of(scores, logp_S), batch) if config.loss_type == "ipo" else ratio_S
        return loss, pair_metrics(pairs.of(config.beta * plain_S), pairs.of(logp_S), totals)

    def _log_ratios(self, scores: Scores, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Pairs]:
        """Log-probabilities of the answers, how much more likely they are than under the reference, and the pairs."""
        config, pairs = self.config, pairs_of(batch)
        logprob_T = scores.logprob_T
        if config.ld_alpha is not None:  # of the model alone, as there
            logprob_T = logprob_T * verbose_weights(batch, pairs, config.ld_alpha)
        logp_S = per_segment(logprob_T, batch)
        ratio_S = logp_S - per_segment(reference_of(scores, logp_S), batch)
        if config.loss_type == "ipo":
            ratio_S = ratio_S / tokens_per_segment(batch, ratio_S.dtype)
        return logp_S, ratio_S, pairs


class _MeanOfSteps:
    """The mean over the steps so far of each step's mean reward."""

    def __init__(self) -> None:
        self._mean, self._steps = 0.0, 0
        self._seen: Totals | None = None

    def after(self, totals: Totals) -> float:
        """With this step's. Micro-batches of one step share `totals`; held-out rows leave the mean as it was."""
        if totals is self._seen:
            return self._mean
        mean = totals["reward_sum"] / max(totals["rewarded"], 1.0)
        with_this = self._mean + (mean - self._mean) / (self._steps + 1)
        if torch.is_grad_enabled():
            self._mean, self._steps, self._seen = with_this, self._steps + 1, totals
        return with_this
