"""Learning-rate schedules, per job."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from lowrank.settings import Fraction, NonNegative, Settings


class ScheduleConfig(Settings):
    """How the learning rate moves over a job's optimiser steps."""

    type: Literal["linear", "cosine", "constant", "cosine_with_restarts", "inverse_sqrt"] = "cosine"
    """Shape after the warmup; linear and cosine end at `min_ratio`. Names and formulas as in transformers."""
    warmup_steps: NonNegative = 0
    """Steps of linear growth from 0."""
    warmup_ratio: Fraction = 0.0
    """Instead of `warmup_steps`: this share of all steps."""
    min_ratio: Fraction = 0.0
    """Learning rate at the end, as a share of the peak (linear and cosine)."""
    num_cycles: int = Field(default=1, gt=0)
    """Restarts of cosine_with_restarts."""

    @model_validator(mode="after")
    def _one_warmup(self) -> ScheduleConfig:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self

    def factor(self, step: int, num_steps: int) -> float:
        """What the peak learning rate is multiplied by at `step` (0 is the first) of `num_steps`."""
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * num_steps)
        if step < warmup:
            return step / max(1, warmup)
        if self.type == "constant":
            return 1.0
        if self.type == "inverse_sqrt":
            # transformers: the time scale is the warmup, or 10,000 steps without one
            scale = warmup or 10_000
            return 1.0 / math.sqrt((step + scale - warmup) / scale)
        progress = (step - warmup) / max(1, num_steps - warmup)
        if progress >= 1.0:
            return self.min_ratio if self.type != "cosine_with_restarts" else 0.0
        if self.type == "linear":
            shape = 1.0 - progress
        elif self.type == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            return 0.5 * (1.0 + math.cos(math.pi * ((self.num_cycles * progress) % 1.0)))
        return self.min_ratio + (1.0 - self.min_ratio) * shape
