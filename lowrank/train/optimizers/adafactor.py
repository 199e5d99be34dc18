"""Adafactor, transformers'."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lowrank.train.optimizers import Groups, OptimizerSettings


class AdafactorConfig(OptimizerSettings):
    """Adam's second moment as a row and a column, and no first: a few bytes for each row of a matrix. As transformers'
    Trainer sets it: the learning rate is the schedule's, not relative to the parameters."""

    paper = "arXiv:1804.04235"
    when = "full tuning with next to no optimizer state"
    may_be_layerwise = True
    type: Literal["adafactor"] = "adafactor"
    decay_rate: float = Field(default=-0.8, lt=0)
    """Exponent with which the second moment's decay approaches 1."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Root mean square to which each parameter's update is clipped."""

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor  # a second to import, and settings are read without it

        return Adafactor(
            groups,
            lr=self.learning_rate,
            decay_rate=self.decay_rate,
            clip_threshold=self.clip_threshold,
            scale_parameter=False,
            relative_step=False,
        )
