"""A third party's variant that is no low-rank update, for the path that none of ours takes yet."""

from __future__ import annotations

from typing import Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants import Tensors, Variant
from lowrank.models.storages import BaseLinear

TYPE = "tests.adapters.variant_cases:Gain"


class GainConfig(AdapterSettings):
    """A gain for each output, and one for each input."""

    type: Literal["tests.adapters.variant_cases:Gain"] = TYPE

    def build(self) -> Variant:
        """The variant."""
        return Gain()


class Gain(Variant):
    """y += s * ((x * (1 + u)) W^T * (1 + v) - x W^T), x being dropped out."""

    Config = GainConfig

    def scale(self, rank: int, alpha: float) -> float:
        """alpha."""
        del rank
        return alpha

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Zeros."""
        del rank, scale, generator
        return {"gain_D": torch.zeros(base.in_features), "gain_O": torch.zeros(base.out_features)}

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """In place on a part of y, as a careless author might."""
        delta_OD = self.merge(base.dense_weight(), scale, tensors) - base.dense_weight()
        y_TO += x_TD @ delta_OD.to(x_TD.dtype).t()
        return y_TO

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """W + s * (diag(1 + v) W diag(1 + u) - W)."""
        gained_OD = (1 + tensors["gain_O"])[:, None] * weight_OD * (1 + tensors["gain_D"])
        return weight_OD + scale * (gained_OD - weight_OD)
