"""An objective of your own: focal loss (arXiv:1708.02002), named `type: custom_objective:Focal`."""

from __future__ import annotations

from typing import Literal

import torch

import lowrank


class _Config(lowrank.Settings):
    """Focal loss on the assistant's turns."""

    type: Literal["custom_objective:Focal"] = "custom_objective:Focal"
    gamma: float = 2.0
    """How fast known tokens lose weight; 0 is plain SFT."""

    def build(self) -> Focal:
        """The objective."""
        return Focal(self.gamma)


class Focal:
    """- sum w (1 - p)^gamma log p / sum w: tokens the model already knows weigh less."""

    Config = _Config
    record = lowrank.Conversation

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def count(self, batch: lowrank.Batch) -> dict[str, float]:
        """Weighted tokens."""
        return {"tokens": float(batch.weight_T.sum())}

    def loss(
        self, scores: lowrank.Scores, batch: lowrank.Batch, totals: dict[str, float]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """This micro-batch's share."""
        known_T = scores.logprob_T.exp()
        loss_T = -batch.weight_T * (1 - known_T) ** self.gamma * scores.logprob_T
        return loss_T.sum() / max(totals["tokens"], 1e-9), {}
