"""What an adapter adds to a frozen linear layer: one file each.

A variant file has a `Config` (an `AdapterSettings` with `type`) whose `build()` returns a `Variant`.
A variant sees the base only as a `BaseLinear`, so every variant works on every storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.models.storages import BaseLinear
from lowrank.settings import choice_of

Tensors = Mapping[str, torch.Tensor]
"""Trainable tensors of one adapter at one layer, by PEFT's name: `lora_A` (R, D), `lora_B` (O, R), ..."""


class Variant(Protocol):
    """One kind of update of a linear layer. `scale` is alpha / rank, or what the variant makes of them."""

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of the update."""
        ...

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Fresh fp32 tensors on the CPU; the layer must compute what the base computes."""
        ...

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(A_RD, B_OR)` if y += scale * (x A^T) B^T says it all: rides the routed linear. None: `apply` is called."""
        ...

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """(dropped-out input, base output) -> output, with autograd."""
        ...

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """The weight of a plain linear that computes the same."""
        ...


if TYPE_CHECKING:

    class AdapterConfig(AdapterSettings):
        """What every variant's `Config` offers."""

        type: str

        def build(self) -> Variant: ...
else:
    AdapterConfig = choice_of(__name__, default="lora")
