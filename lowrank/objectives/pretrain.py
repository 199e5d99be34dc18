"""(Continued) pre-training: the same loss as `sft`, over plain text in which every token counts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lowrank.objectives import Objective, ObjectiveSettings
from lowrank.objectives.sft import SmoothedLoss, TokenLoss
from lowrank.records import Text


class PretrainConfig(ObjectiveSettings):
    """Pre-training on plain text, each document on its own."""

    when = "new knowledge, a new language or domain, from plain text"
    type: Literal["pretrain"] = "pretrain"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that goes to all tokens alike, as transformers' `label_smoothing_factor`."""

    def build(self) -> Objective:
        """Cross-entropy over all tokens of a text: `SmoothedLoss` with `label_smoothing`, else `TokenLoss`."""
        return SmoothedLoss(Text, self.label_smoothing) if self.label_smoothing else TokenLoss(Text)
