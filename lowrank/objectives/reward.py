"""A reward model (Bradley-Terry): a number for each answer, higher for the chosen one of a pair.

The number is the value head's, a trained vector on the hidden state of the answer's last token, as in transformers'
sequence classification and TRL. It is saved beside the adapter as value_head.safetensors.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics, Objective, ObjectiveSettings
from lowrank.objectives.sequence_loss import count_pairs, pair_metrics, pairs_of
from lowrank.records import Preference


class RewardConfig(ObjectiveSettings):
    """Preference pairs: a value head learns to give the chosen answer more than the rejected one."""

    paper = "arXiv:2203.02155"
    when = "a judge for ppo, or to rank answers"
    type: Literal["reward"] = "reward"
    center_rewards_coefficient: float = Field(default=0.0, ge=0)
    """Weight of a penalty on (chosen + rejected)^2, which keeps rewards around 0 (arXiv:2312.09244); 0.01 is usual."""

    def build(self) -> Objective:
        """A `Reward` of these settings, for one job: the engine calls its `count` and `loss`."""
        return Reward(self.center_rewards_coefficient)


class Reward:
    """Mean over pairs of - log sigmoid(reward of chosen - reward of rejected), plus the centering penalty."""

    record = Preference
    needs = ("value",)

    def __init__(self, center_rewards_coefficient: float) -> None:
        self.center_rewards_coefficient = center_rewards_coefficient

    def count(self, batch: Batch) -> Totals:
        """Pairs, and tokens of their answers."""
        return count_pairs(batch)

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class."""
        assert scores.value_S is not None, "the objective needs a value head, and there is none"
        rewards = pairs_of(batch).of(scores.value_S)
        losses_P = -F.logsigmoid(rewards[0] - rewards[1])
        if self.center_rewards_coefficient:
            losses_P = losses_P + self.center_rewards_coefficient * (rewards[0] + rewards[1]) ** 2
        return losses_P.sum() / max(totals["pairs"], 1.0), pair_metrics(rewards, None, totals)
