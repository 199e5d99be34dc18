"""LoRA: y += alpha / rank * B A x (arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.base import Tensors, Variant
from lowrank.models.storages import BaseLinear


class LoraConfig(AdapterSettings):
    """Low-rank adaptation."""

    paper: ClassVar[str] = "arXiv:2106.09685"
    when: ClassVar[str] = "the default"
    peft_fields: ClassVar[Mapping[str, Any] | None] = {}
    reaches_heads: ClassVar[bool] = True
    type: Literal["lora"] = "lora"

    def build(self) -> Variant:
        """A `Lora` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Lora()


class Lora(Variant):
    """A (R, D) starts Kaiming-uniform, B (O, R) starts at zero, as in PEFT."""

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Identity at the start, since B is zero."""
        del scale
        A_RD = torch.empty(rank, base.in_features)
        torch.nn.init.kaiming_uniform_(A_RD, a=math.sqrt(5), generator=generator)
        return {"lora_A": A_RD, "lora_B": torch.zeros(base.out_features, rank)}

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """It is low-rank as it stands."""
        return tensors["lora_A"], tensors["lora_B"]
