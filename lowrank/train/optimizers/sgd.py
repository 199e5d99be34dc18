"""Stochastic gradient descent, torch's fused one."""

from __future__ import annotations

from typing import Literal

import torch

from lowrank.settings import Fraction
from lowrank.train.optimizers import Groups, OptimizerSettings


class SGDConfig(OptimizerSettings):
    """Plain gradient descent. Without momentum it keeps nothing; with it, 4 bytes for each parameter."""

    when = "to see what the gradient alone does; no memory at all"
    may_be_layerwise = True
    type: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.0
    """Share of the last update in the next one."""

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, fused=True)
