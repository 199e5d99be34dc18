"""rsLoRA: LoRA with the scale alpha / sqrt(rank), so that high ranks learn as fast (arXiv:2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.base import Variant
from lowrank.adapters.variants.lora import Lora


class RsLoraConfig(AdapterSettings):
    """Rank-stabilized LoRA."""

    paper: ClassVar[str] = "arXiv:2312.03732"
    when: ClassVar[str] = "ranks of 32 and more"
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"use_rslora": True}
    reaches_heads: ClassVar[bool] = True
    type: Literal["rslora"] = "rslora"

    def build(self) -> Variant:
        """A `RsLora` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return RsLora()


class RsLora(Lora):
    """LoRA but for its scale."""

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / sqrt(rank)."""
        return alpha / math.sqrt(rank)
