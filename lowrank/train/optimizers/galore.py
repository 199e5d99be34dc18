"""GaLore: AdamW in the leading singular directions of each gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.low_rank_gradients import LowRankSettings, decay, moments_of, project, project_back
from lowrank.train.optimizers.per_parameter import PerParameterOptimizer


class GaLoreConfig(LowRankSettings):
    """AdamW of gradients projected to their leading singular vectors; state of rank R instead of full."""

    paper = "arXiv:2403.03507"
    when = "full tuning with the optimizer state of LoRA; a singular value decomposition now and then"
    type: Literal["galore"] = "galore"

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return GaLore(self.with_projected(groups), self)


class GaLore(PerParameterOptimizer):
    """The published AdamW, projection `std`."""

    def __init__(self, groups: Groups, settings: GaLoreConfig) -> None:
        self.settings = settings
        super().__init__(groups, settings)

    def update(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        del name
        state = self.state[parameter]
        if not group["projected"]:
            direction, size = moments_of(state, gradient, group)
        else:
            if state.get("step", 0) % self.settings.update_interval == 0:
                state["projection"] = leading_vectors(gradient, self.settings.rank)
            projection = state["projection"]
            low, size = moments_of(state, project(gradient, projection), group)
            direction = project_back(low, projection, gradient) * self.settings.scale
        parameter.add_(direction, alpha=-size)
        decay(parameter, group)


def leading_vectors(gradient_OD: torch.Tensor, rank: int) -> torch.Tensor:
    """The first right singular vectors (R, D) of a tall matrix, the first left ones (O, R) of a wide one."""
    left, _, right = torch.linalg.svd(gradient_OD.float(), full_matrices=False)
    tall = gradient_OD.shape[0] >= gradient_OD.shape[1]
    return (right[:rank] if tall else left[:, :rank]).contiguous().to(gradient_OD.dtype)
