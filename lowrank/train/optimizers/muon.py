"""Muon, torch's, for matrices; AdamW for everything else."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from lowrank.settings import Fraction
from lowrank.train.optimizers import Groups, split
from lowrank.train.optimizers.adamw import AdamSettings

_OF_VOCABULARY = ("embed", "wte", "wpe", "lm_head")
"""In the names of embeddings and heads, which are tables of vectors rather than maps."""


class MuonConfig(AdamSettings):
    """Momentum, made orthogonal, for the matrices inside the model; AdamW for embeddings, heads, norms and biases.
    4 bytes for each parameter of a matrix. Updates are as large as AdamW's, so its learning rates hold."""

    paper = "https://kellerjordan.github.io/posts/muon"
    when = "full tuning and pre-training; half of AdamW's state"
    type: Literal["muon"] = "muon"
    momentum: Fraction = 0.95
    """Share of the momentum in the next one."""
    ns_steps: int = Field(default=5, gt=0)
    """Newton-Schulz iterations that make it orthogonal."""

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        matrices, others = split(groups, _is_map)
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=self.learning_rate,
                    momentum=self.momentum,
                    ns_steps=self.ns_steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            parts.append(self.fused_adamw(others))
        return ChainedOptimizer(parts)


def _is_map(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and not any(part in name for part in _OF_VOCABULARY)


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each over other parameters, used as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make the groups and state of the parts the same objects as those of this optimizer."""
        done = 0
        for part in self.parts:
            number = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[done : done + number], self.state
            done += number

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        del closure
        for part in self.parts:
            part.step()
