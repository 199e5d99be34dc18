"""AdamW, torch's fused one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from lowrank.train.optimizers import Groups, OptimizerSettings

_STEP_BYTES = 64
"""The number of steps, which each parameter has of its own, and allocators give no less."""


class AdamSettings(OptimizerSettings):
    """What Adam and its relatives share."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    def fused_adamw(self, groups: Groups) -> torch.optim.Optimizer:
        """torch's."""
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)


class AdamWConfig(AdamSettings):
    """Adam with decoupled weight decay. 8 bytes for each trained parameter."""

    paper = "arXiv:1711.05101"
    when = "the default"
    may_be_layerwise = True
    type: Literal["adamw"] = "adamw"

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return self.fused_adamw(groups)

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return sum(2 * parameter.numel() * parameter.itemsize + _STEP_BYTES for parameter in parameters.values())
