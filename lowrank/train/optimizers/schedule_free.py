"""Schedule-free AdamW, its authors' library."""

from __future__ import annotations

from typing import Literal

import torch

from lowrank.errors import ConfigError
from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.adamw import AdamSettings


class ScheduleFreeConfig(AdamSettings):
    """AdamW that averages its own steps, so that it can stop at any time: no schedule, `schedule: constant`. The
    average is what is evaluated and kept. 8 bytes for each trained parameter."""

    paper = "arXiv:2405.15682"
    when = "when the number of steps is not known beforehand"
    has_own_schedule = True
    type: Literal["schedule_free"] = "schedule_free"

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError as error:
            raise ConfigError(
                "optimizer.type: schedule_free needs schedulefree: pip install 'lowrank-llm[optimizers]'; or use adamw"
            ) from error
        optimizer = AdamWScheduleFree(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps)
        optimizer.train()
        return optimizer
