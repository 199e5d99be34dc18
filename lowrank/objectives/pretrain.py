"""(Continued) pre-training: the same loss as `sft`, over plain text in which every token counts."""

from __future__ import annotations

from typing import Literal

from lowrank.objectives import Objective, ObjectiveSettings
from lowrank.objectives.sft import TokenLoss
from lowrank.records import Text


class Config(ObjectiveSettings):
    """Pre-training on plain text, each document on its own."""

    when = "new knowledge, a new language or domain, from plain text"
    type: Literal["pretrain"] = "pretrain"

    def build(self) -> Objective:
        """The objective."""
        return TokenLoss(Text)
