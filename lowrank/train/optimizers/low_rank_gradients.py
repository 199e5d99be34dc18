"""What GaLore and APOLLO share: AdamW's moments of a gradient that is projected to few dimensions.

A matrix G (O, D) is projected along its longer side's partner: with O >= D, G P^T with P (R, D); else P^T G with
P (O, R). The published libraries keep the projection as Python objects, which no checkpoint of tensors holds (and
apollo-torch is not free software), so the two are written here; tests compare with them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import nn

from lowrank.settings import Positive
from lowrank.train.optimizers import Groups, split
from lowrank.train.optimizers.adamw import AdamSettings


class LowRankSettings(AdamSettings):
    """Settings of both."""

    not_for_adapters = "the matrices of an adapter are of low rank already"
    may_be_layerwise = True

    rank: Positive = 16
    """Dimensions to which a gradient is projected."""
    update_interval: Positive = 200
    """Steps between new projections."""
    scale: float = Field(default=2.0, gt=0)
    """Factor of the update of a projected parameter."""
    targets: tuple[str, ...] | str = "all"
    """Projected: matrices whose names have one of these in them; `all`: every matrix that is no embedding or head."""

    def with_projected(self, groups: Groups) -> Groups:
        """Return the groups with a flag `projected`."""
        chosen, others = split(groups, self.is_target)
        return [{**group, "projected": True} for group in chosen] + [{**group, "projected": False} for group in others]

    def is_target(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether the gradient of a parameter is projected."""
        if parameter.ndim != 2 or min(parameter.shape) <= self.rank:
            return False
        if self.targets == "all":
            return not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
        return any(target in name for target in ([self.targets] if isinstance(self.targets, str) else self.targets))


def moments_of(state: dict[str, Any], gradient: torch.Tensor, group: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Return `(Adam's direction, its step size)` for a gradient, projected or not, and update the moments and
    `step`."""
    beta1, beta2 = group["betas"]
    state["step"] = state.get("step", 0) + 1
    first = state.setdefault("exp_avg", torch.zeros_like(gradient))
    second = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
    first.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    correction = math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
    return first / second.sqrt().add_(group["eps"]), group["lr"] * correction


def project(gradient_OD: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Return the projected gradient, (O, R) or (R, D)."""
    tall = gradient_OD.shape[0] >= gradient_OD.shape[1]
    return gradient_OD @ projection.t() if tall else projection.t() @ gradient_OD


def low_shape(parameter_OD: torch.Tensor, rank: int) -> tuple[int, int]:
    """Return the shape of a projected gradient."""
    rows, columns = parameter_OD.shape
    return (rows, rank) if rows >= columns else (rank, columns)


def project_back(low: torch.Tensor, projection: torch.Tensor, like_OD: torch.Tensor) -> torch.Tensor:
    """Return a projected update as (O, D)."""
    return low @ projection if like_OD.shape[0] >= like_OD.shape[1] else projection @ low


def decay(parameter: torch.Tensor, group: dict[str, Any]) -> None:
    """Apply decoupled weight decay, after the update as in both libraries."""
    if group["weight_decay"]:
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
