"""AdamW with its moments in 8 bit, bitsandbytes'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.adamw import AdamSettings
from lowrank.train.optimizers.with_bitsandbytes import bytes_in_8_bit, optimizer_of_bitsandbytes


class AdamW8bitConfig(AdamSettings):
    """AdamW that keeps its moments in 8 bit: 2 bytes for each trained parameter."""

    paper = "arXiv:2110.02861"
    when = "full tuning, where AdamW's state does not fit"
    may_be_layerwise = True
    type: Literal["adamw_8bit"] = "adamw_8bit"

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return optimizer_of_bitsandbytes(
            "AdamW8bit", groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=0.0
        )

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return bytes_in_8_bit(parameters.values(), moments=2)
