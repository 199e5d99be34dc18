"""Lion. torch has none, and bitsandbytes' needs bitsandbytes for six lines."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lowrank.train.optimizers import Groups, OptimizerSettings


class LionConfig(OptimizerSettings):
    """The sign of an interpolated momentum: 4 bytes for each trained parameter."""

    paper = "arXiv:2302.06675"
    when = "half of AdamW's state; a learning rate 3 to 10 times smaller than AdamW's"
    type: Literal["lion"] = "lion"
    betas: tuple[float, float] = (0.9, 0.99)
    """Share of the momentum in the update, and decay rate of the momentum."""

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return Lion(groups, self.learning_rate, self.betas)


class Lion(torch.optim.Optimizer):
    """theta -= lr (sign(b1 m + (1 - b1) g) + decay theta); m = b2 m + (1 - b2) g."""

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        del closure
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                update = torch.lerp(parameter.grad, momentum, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)
