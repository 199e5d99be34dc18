"""LoRA: y += alpha / rank * B A x (arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants import Tensors, Variant
from lowrank.models.storages import BaseLinear


class Config(AdapterSettings):
    """Low-rank adaptation."""

    peft_fields: ClassVar[Mapping[str, Any] | None] = {}
    type: Literal["lora"] = "lora"

    def build(self) -> Variant:
        """The variant."""
        return Lora()


class Lora:
    """A (R, D) starts Kaiming-uniform, B (O, R) starts at zero, as in PEFT."""

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / rank."""
        return alpha / rank

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Identity at the start, since B is zero."""
        del scale
        A_RD = torch.empty(rank, base.in_features)
        torch.nn.init.kaiming_uniform_(A_RD, a=math.sqrt(5), generator=generator)
        return {"lora_A": A_RD, "lora_B": torch.zeros(base.out_features, rank)}

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """It is low-rank as it stands."""
        return tensors["lora_A"], tensors["lora_B"]

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """y + scale * (x A^T) B^T."""
        A_RD, B_OR = (tensor.to(x_TD.dtype) for tensor in self.as_low_rank(tensors))
        return y_TO + scale * (x_TD @ A_RD.t()) @ B_OR.t()

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """W + scale * B A, computed in the wider of the two dtypes."""
        A_RD, B_OR = self.as_low_rank(tensors)
        wide = torch.promote_types(weight_OD.dtype, A_RD.dtype)
        return (weight_OD.to(wide) + scale * (B_OR.to(wide) @ A_RD.to(wide))).to(weight_OD.dtype)
