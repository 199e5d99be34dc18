"""DoRA with rsLoRA's scale, alpha / sqrt(rank): PEFT's `use_dora` and `use_rslora` together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lowrank.adapters.variants.base import Variant
from lowrank.adapters.variants.dora import Dora, DoraConfig


class RsDoraConfig(DoraConfig):
    """Rank-stabilized DoRA."""

    when: ClassVar[str] = "DoRA at ranks of 32 and more"
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"use_dora": True, "use_rslora": True}
    type: Literal["rsdora"] = "rsdora"  # type: ignore[assignment]

    def build(self) -> Variant:
        """A `RsDora` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return RsDora()


class RsDora(Dora):
    """DoRA but for its scale."""

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / sqrt(rank)."""
        return alpha / math.sqrt(rank)
