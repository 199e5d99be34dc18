"""What every packed storage shares: y = x W^T + b over a weight that exists whole only while it is used.

Nothing dense is saved for the backward pass: it unpacks once more. There is no second path for
evaluation, so an evaluation leaves nothing behind that training could trip over (two well-known
libraries repack in eval and lose the gradient).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class PackedLinear(nn.Module):
    """A frozen `BaseLinear`; a storage adds its buffers and `dense_weight`."""

    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias_O: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().to(dtype))

    def dense_weight(self) -> torch.Tensor:
        """W as (O, D) in `self.dtype`, in scratch memory: good until the next call."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., O), in the dtype of `x`."""
        return _FrozenProduct.apply(x, self)

    def extra_repr(self) -> str:
        """As torch prints a linear layer."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.dtype}"


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: PackedLinear) -> torch.Tensor:
        ctx.linear = linear
        bias = linear.bias
        return F.linear(x, linear.dense_weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (dy,) = outer
        return (dy @ ctx.linear.dense_weight().to(dy.dtype) if ctx.needs_input_grad[0] else None), None
