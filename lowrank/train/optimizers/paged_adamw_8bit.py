"""AdamW with its moments in 8 bit, which move to host memory when the GPU is full; bitsandbytes'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.adamw import AdamSettings
from lowrank.train.optimizers.with_bitsandbytes import bytes_in_8_bit, optimizer_of_bitsandbytes, unpaged


class PagedAdamW8bitConfig(AdamSettings):
    """`adamw_8bit` whose state may be paged out to host memory."""

    paper = "arXiv:2305.14314"
    when = "as adamw_8bit, on a GPU that is nearly full"
    type: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        on_gpu = groups[0]["params"][0].device.type == "cuda"
        name = "PagedAdamW8bit" if on_gpu else "AdamW8bit"
        return optimizer_of_bitsandbytes(
            name, groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=0.0
        )

    def notes(self, device: torch.device) -> list[str]:
        return unpaged(self.type, device)

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return bytes_in_8_bit(parameters.values(), moments=2)
