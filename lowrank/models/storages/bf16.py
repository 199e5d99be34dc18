"""Weights in bfloat16 under a run that computes in float32: half the memory, for processors without bf16 arithmetic.

A checkpoint in bfloat16 keeps every value: a weight is widened while a product needs it, as a packed one is unpacked.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from lowrank.kernels.scratch import scratch
from lowrank.models.storages.packed import PackedLinear, QuantizedStorage, bias_of, weight_of


class Bf16Config(QuantizedStorage):
    """16 bits per weight: exact for checkpoints in bfloat16, rounded for those in float16 and float32. Worth it with
    `model.dtype: float32`, of which it halves the linear layers' memory; embedding and head stay in float32."""

    type: Literal["bf16"] = "bf16"
    skip_modules: tuple[str, ...] = ()
    """Linear layers, or the experts of a mixture, that stay in the run's dtype, by name or the end of a name. The head
    and tied weights always do."""

    def wrap(self, linear: nn.Module) -> Bf16Linear:
        """The layer in bfloat16, on the device its weight is on."""
        weight_OD = weight_of(linear)
        return Bf16Linear(weight_OD.to(torch.bfloat16).contiguous(), bias_of(linear), weight_OD.dtype)

    def bytes_of(self, shape: tuple[int, int], itemsize: int = 2) -> int:
        """What it keeps of a weight of (O, D)."""
        del itemsize
        return 2 * shape[0] * shape[1]


class Bf16Linear(PackedLinear):
    """W is what bfloat16 holds of it."""

    narrow: torch.Tensor

    def __init__(self, narrow_OD: torch.Tensor, bias_O: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(narrow_OD.shape[1], narrow_OD.shape[0], bias_O, dtype)
        self.register_buffer("narrow", narrow_OD)

    def dense_weight(self) -> torch.Tensor:
        """W as (O, D), in scratch memory, but in a run that computes in bfloat16 anyway."""
        if self.dtype == torch.bfloat16:
            return self.narrow
        return scratch((self.out_features, self.in_features), self.dtype, self.narrow.device).copy_(self.narrow)
