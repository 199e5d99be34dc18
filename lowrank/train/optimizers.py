"""Optimisers and learning-rate schedules, per job."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from lowrank.settings import Fraction, NonNegative, Settings


class OptimizerConfig(Settings):
    """How a job's parameters are updated."""

    type: Literal["adamw", "sgd"] = "adamw"
    """adamw: Adam with decoupled weight decay (arXiv:1711.05101). sgd: plain gradient descent."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate; LoRA likes about ten times what full fine-tuning likes."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the job's own gradient to this norm; null: never."""
    max_skipped_steps: NonNegative = 5
    """A step whose loss or gradient is not finite is skipped; after this many in a row the job stops, the others go
    on."""

    def build(
        self, parameters: Iterable[torch.nn.Parameter], factors: Sequence[float] | None = None
    ) -> torch.optim.Optimizer:
        """The optimiser over one job's parameters. `factors`: what each one's learning rate is multiplied by."""
        parameters = _in_groups(list(parameters), factors)
        if self.type == "sgd":
            return torch.optim.SGD(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
        return torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )


def _in_groups(parameters: Sequence[torch.nn.Parameter], factors: Sequence[float] | None) -> list[Any]:
    """One group for each factor, kept in it as `lr_factor`; plain parameters where all learn equally fast."""
    if factors is None or set(factors) <= {1.0}:
        return list(parameters)
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for parameter, factor in zip(parameters, factors):
        groups.setdefault(factor, []).append(parameter)
    return [{"params": own, "lr_factor": factor} for factor, own in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Of the next step; groups that learn faster or slower keep their factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)


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
