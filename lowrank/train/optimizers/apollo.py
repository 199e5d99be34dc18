"""APOLLO: plain gradients, scaled by channel as AdamW would scale them in a random projection."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from lowrank.devices import to_device
from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.low_rank_gradients import LowRankSettings, decay, moments_of, project
from lowrank.train.optimizers.per_parameter import PerParameterOptimizer

_SEEDS = 1_000_003
"""More than a model has parameters: every projection has a seed of its own."""
_GROWTH = 1.01
"""A scaled gradient's norm grows by no more than this from step to step (Fira, arXiv:2410.01623)."""


class ApolloConfig(LowRankSettings):
    """AdamW's scaling of gradients, found in a random projection of rank R; no singular value decomposition."""

    paper = "arXiv:2412.05270"
    when = "as galore, with cheaper steps"
    type: Literal["apollo"] = "apollo"
    scale_type: Literal["channel", "tensor"] = "channel"
    """One factor for each channel, or one for the whole matrix (APOLLO-Mini, with rank 1 and a scale of 128)."""

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return Apollo(self.with_projected(groups), self)


class Apollo(PerParameterOptimizer):
    """The published AdamW, projection `random`."""

    def __init__(self, groups: Groups, settings: ApolloConfig) -> None:
        self.settings = settings
        super().__init__(groups, settings)
        ordered = [parameter for group in self.param_groups for parameter in group["params"]]
        self._seeds = {parameter: index + 1 for index, parameter in enumerate(ordered)}

    def update(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        del name
        state = self.state[parameter]
        if not group["projected"]:
            direction, size = moments_of(state, gradient, group)
        else:
            if state.get("step", 0) % self.settings.update_interval == 0:
                drawn = state.get("step", 0) // self.settings.update_interval
                seed = self._seeds[parameter] + _SEEDS * drawn
                state["projection"] = random_projection(gradient, self.settings.rank, seed)
            low = project(gradient, state["projection"])
            low_direction, size = moments_of(state, low, group)
            direction = self._scaled(state, gradient, low, low_direction)
        parameter.add_(direction, alpha=-size)
        decay(parameter, group)

    def _scaled(
        self, state: dict[str, Any], gradient: torch.Tensor, low: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        channel = 0 if gradient.shape[0] < gradient.shape[1] else 1
        if self.settings.scale_type == "channel":
            factor = direction.norm(dim=channel, keepdim=True) / (low.norm(dim=channel, keepdim=True) + 1e-8)
        else:
            factor = direction.norm() / (low.norm() + 1e-8)
        scaled = gradient * factor
        norm = scaled.norm()
        if "norm" in state:
            limit = (norm / (state["norm"] + 1e-8)).clamp(min=_GROWTH) / _GROWTH
            scaled, norm = scaled / limit, norm / limit
        state["norm"] = norm
        return scaled * math.sqrt(self.settings.scale)


def random_projection(gradient_OD: torch.Tensor, rank: int, seed: int) -> torch.Tensor:
    """Normal numbers of variance 1 / R: (R, D) for a tall matrix, (O, R) for a wide one."""
    rows, columns = gradient_OD.shape
    shape = (rank, columns) if rows >= columns else (rows, rank)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)
    return to_device(drawn.to(gradient_OD.dtype), gradient_OD.device)
