"""AdamW whose moments move to host memory when the GPU is full; bitsandbytes'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.adamw import AdamSettings
from lowrank.train.optimizers.with_bitsandbytes import optimizer_of_bitsandbytes, unpaged


class PagedAdamW32bitConfig(AdamSettings):
    """AdamW in 32 bit whose state may be paged out to host memory; elsewhere than on a GPU it is `adamw`."""

    paper = "arXiv:2305.14314"
    when = "QLoRA on a GPU that is nearly full"
    type: Literal["paged_adamw_32bit"] = "paged_adamw_32bit"

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        if groups[0]["params"][0].device.type != "cuda":
            return self.fused_adamw(groups)
        return optimizer_of_bitsandbytes(
            "PagedAdamW32bit", groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=0.0
        )

    def notes(self, device: torch.device) -> list[str]:
        return unpaged(self.type, device)

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return sum(8 * parameter.numel() for parameter in parameters.values())
