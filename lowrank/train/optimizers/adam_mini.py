"""Adam-mini: one second moment for each block of weights that belong together, instead of one for each weight."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.adamw import AdamSettings
from lowrank.train.optimizers.per_parameter import PerParameterOptimizer

_OF_HEADS = ("q_proj.weight", "k_proj.weight")
"""Matrices whose rows belong together by heads; in models that fuse them with the values, each row is a block."""


class AdamMiniConfig(AdamSettings):
    """AdamW with one second moment for each head of queries and keys, each row of any other matrix (what a neuron
    weighs its input with, or a token's embedding), each bias and each norm. 4 bytes for each trained parameter."""

    paper = "arXiv:2406.16793"
    when = "full tuning with half of AdamW's state and its steps"
    type: Literal["adam_mini"] = "adam_mini"

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return AdamMini(groups, self)


class AdamMini(PerParameterOptimizer):
    """The published partition (algorithm 3). Written here because its library prints, asks for torch.distributed, and
    must be told the names and sizes of heads."""

    def update(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        blocks = num_blocks(name, parameter, group.get("head_dim"))
        state["step"] = state.get("step", 0) + 1
        first = state.setdefault("exp_avg", torch.zeros_like(parameter, memory_format=torch.contiguous_format))
        second = state.setdefault("exp_avg_sq", gradient.new_zeros(blocks, 1))
        first.lerp_(gradient, 1.0 - beta1)
        mean_square = gradient.reshape(blocks, -1).square().mean(dim=1, keepdim=True)
        second.mul_(beta2).add_(mean_square, alpha=1.0 - beta2)
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        root = (second.sqrt() / math.sqrt(1.0 - beta2 ** state["step"])).add_(group["eps"])
        size = group["lr"] / (1.0 - beta1 ** state["step"])
        parameter.view(blocks, -1).addcdiv_(first.view(blocks, -1), root, value=-size)


def num_blocks(name: str, parameter: torch.Tensor, head_dim: int | None) -> int:
    """Blocks of consecutive weights that share a second moment."""
    if parameter.ndim < 2:
        return parameter.numel() if "bias" in name else 1
    rows = parameter.shape[0]
    if name.endswith(_OF_HEADS) and head_dim and rows % head_dim == 0:
        return rows // head_dim
    return rows
