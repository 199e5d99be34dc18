"""Kahneman-Tversky optimization (arXiv:2402.01306): answers that are known to be good or bad, without pairs.

How far the model has moved from the base is estimated on mismatched answers (each prompt with another row's answer),
without gradient, over the whole step before any loss. The reference is the bare base.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics, Objective, ObjectiveSettings
from lowrank.objectives.sequence_loss import per_segment, reference_of
from lowrank.records import Rated
from lowrank.segments import CHOSEN, MISMATCHED, REJECTED


class KTOConfig(ObjectiveSettings):
    """Rated answers: desirable ones gain on what the bare base thinks of them, undesirable ones lose."""

    paper = "arXiv:2402.01306"
    when = "thumbs up and down, without pairs"
    type: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the base; larger stays nearer."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of the desirable answers; with 1 in 3 of them, 2 makes both kinds count the same."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of the undesirable answers."""
    pref_ftx: float = Field(default=0.0, ge=0)
    """Weight of the plain SFT loss on the desirable answers, added to the loss."""
    reference_model: str | None = None
    """A model that answers are compared with, instead of the bare base: a folder or hub name with the same tokens."""

    def build(self) -> Objective:
        """A `KTO` of these settings, for one job: the engine calls its `count` and `loss`."""
        return KTO(self)


class KTO:
    """Mean over answers of weight (1 - sigmoid(beta (log ratio - kl))), with the sign turned for undesirable ones."""

    record = Rated
    needs = ("reference", "mismatched")

    def __init__(self, config: KTOConfig) -> None:
        self.config = config

    def count(self, batch: Batch) -> Totals:
        """Answers of both kinds, and their tokens."""
        count_S = per_segment(torch.ones_like(batch.weight_T), batch)
        desirable_S, undesirable_S = batch.role_S == CHOSEN, batch.role_S == REJECTED
        return {
            "desirable": float(desirable_S.sum()),
            "undesirable": float(undesirable_S.sum()),
            "desirable_tokens": float(count_S[desirable_S].sum()),
            "tokens": float(count_S[desirable_S | undesirable_S].sum()),
        }

    def observe(self, scores: Scores, batch: Batch) -> Totals:
        """Log ratios of the mismatched answers, to be averaged over the step."""
        ratio_S = per_segment(scores.logprob_T - reference_of(scores, scores.logprob_T), batch)
        mismatched_S = batch.role_S == MISMATCHED
        return {"mismatched": float(mismatched_S.sum()), "mismatched_ratio": float(ratio_S[mismatched_S].sum())}

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class. `kl` is the mean log ratio of the step's mismatched answers, at least 0."""
        config = self.config
        kl = max(totals.get("mismatched_ratio", 0.0) / max(totals.get("mismatched", 0.0), 1.0), 0.0)
        logp_S = per_segment(scores.logprob_T, batch)
        ratio_S = logp_S - per_segment(reference_of(scores, logp_S), batch)
        good_S, bad_S = batch.role_S == CHOSEN, batch.role_S == REJECTED
        good = _sum(1 - torch.sigmoid(config.beta * (ratio_S - kl)), good_S)
        bad = _sum(1 - torch.sigmoid(config.beta * (kl - ratio_S)), bad_S)
        answers = max(totals["desirable"] + totals["undesirable"], 1.0)
        loss = (config.desirable_weight * good + config.undesirable_weight * bad) / answers
        if config.pref_ftx:
            loss = loss - config.pref_ftx * _sum(logp_S, good_S) / max(totals["desirable_tokens"], 1e-9)
        metrics: Metrics = {"kl": kl * (good_S | bad_S).sum() / answers}
        sides = {"chosen": (good_S, totals["desirable"]), "rejected": (bad_S, totals["undesirable"])}
        for name, (mask_S, count) in sides.items():
            if count:  # a step may have none of a kind; its mean is then left out, not 0
                metrics[f"rewards/{name}"] = config.beta * _sum(ratio_S.detach(), mask_S) / count
                metrics[f"logps/{name}"] = _sum(logp_S.detach(), mask_S) / count
        if totals["desirable"] and totals["undesirable"]:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return loss, metrics


def _sum(value_S: torch.Tensor, of_S: torch.Tensor) -> torch.Tensor:
    """Over those segments alone. Picking them out instead would wait for the device to say how many there are."""
    return torch.where(of_S, value_S, 0.0).sum()
