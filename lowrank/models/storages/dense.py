"""Weights as they are: 16, 32 or 64 bit floats."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from lowrank.settings import Settings


class DenseConfig(Settings):
    """Dense storage: the weights in the run's dtype."""

    type: Literal["dense"] = "dense"

    def wrap(self, linear: nn.Module) -> DenseLinear:
        """The frozen base layer of an `nn.Linear` or a transformers `Conv1D` (GPT-2: weight kept as (D, O))."""
        return DenseLinear(linear)

    def bytes_of(self, shape: tuple[int, int], itemsize: int = 2) -> int:
        """What a weight of (O, D) takes."""
        return shape[0] * shape[1] * itemsize


class DenseLinear(nn.Module):
    """A `BaseLinear` over the parameters of the layer it wraps; nothing is copied."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        self.bias = bias if isinstance(bias, nn.Parameter) else None
        self.transposed = not isinstance(linear, nn.Linear)
        self.out_features, self.in_features = reversed(weight.shape) if self.transposed else weight.shape

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TD, self.dense_weight(), self.bias)

    def dense_weight(self) -> torch.Tensor:
        """(O, D): a view, nothing is copied."""
        return self.weight.t() if self.transposed else self.weight
