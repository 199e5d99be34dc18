"""The base class of optimizers that update one parameter after another."""

from __future__ import annotations

from typing import Any

import torch

from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.adamw import AdamSettings


class PerParameterOptimizer(torch.optim.Optimizer):
    """An optimizer with Adam's settings, whose subclasses implement `update`."""

    def __init__(self, groups: Groups, settings: AdamSettings) -> None:
        defaults = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps, "weight_decay": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        del closure
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                if parameter.grad is not None:
                    self.update(name, parameter, parameter.grad, group)

    def update(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        """Update one parameter and its state from its gradient."""
        raise NotImplementedError
