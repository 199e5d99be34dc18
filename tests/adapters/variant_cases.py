"""Third parties: a variant that is no low-rank update and careless, and a storage that loses something."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.base import Tensors, Variant
from lowrank.models.storages import BaseLinear
from lowrank.settings import Settings

LOSSY = "tests.adapters.variant_cases:Rounded"
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
        weight_OD = base.dense_weight().clone()  # it may be scratch memory
        delta_OD = self.merge(weight_OD, scale, tensors) - weight_OD
        y_TO += x_TD @ delta_OD.to(x_TD.dtype).t()
        return y_TO

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """W + s * (diag(1 + v) W diag(1 + u) - W)."""
        gained_OD = (1 + tensors["gain_O"])[:, None] * weight_OD * (1 + tensors["gain_D"])
        return weight_OD + scale * (gained_OD - weight_OD)


class RoundedConfig(Settings):
    """Fifteen values per row."""

    type: Literal["tests.adapters.variant_cases:Rounded"] = LOSSY

    def wrap(self, linear: nn.Module) -> Rounded:
        """The frozen base layer of a linear layer or Conv1D."""
        return Rounded(linear)


class Rounded(nn.Module):
    """int4 by rows. `dense_weight` is scratch memory that the next call of any layer overwrites."""

    Config = RoundedConfig
    scratch: dict[tuple[int, ...], torch.Tensor] = {}  # noqa: RUF012 (shared on purpose)

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, torch.Tensor)
        self.transposed = not isinstance(linear, nn.Linear)
        weight_OD = weight.detach().t() if self.transposed else weight.detach()
        self.step_O1 = weight_OD.abs().amax(1, keepdim=True) / 7
        self.code_OD = (weight_OD / self.step_O1).round().to(torch.int8)
        self.bias = bias if isinstance(bias, nn.Parameter) else None
        self.out_features, self.in_features = weight_OD.shape

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x W^T + b."""
        return F.linear(x_TD, self.dense_weight(), self.bias)

    def dense_weight(self) -> torch.Tensor:
        """In scratch memory."""
        shape = tuple(self.code_OD.shape)
        buffer = self.scratch.setdefault(
            (*shape, self.step_O1.element_size()), torch.empty(shape, dtype=self.step_O1.dtype)
        )
        return buffer.copy_(self.code_OD).mul_(self.step_O1)
