"""A frozen layer inside autograd. Its weight may be decoded into scratch memory, which autograd must not keep."""

from __future__ import annotations

from typing import Any

import torch

from lowrank.models.storages import BaseLinear


def frozen_linear(x_TD: torch.Tensor, base: BaseLinear) -> torch.Tensor:
    """x W^T + b; the gradient reaches `x_TD`, the weight is decoded anew for it."""
    result = _FrozenLinear.apply(x_TD, base)
    assert isinstance(result, torch.Tensor)
    return result


def bias_of(base: BaseLinear) -> torch.Tensor | None:
    """The frozen bias."""
    return getattr(base, "bias", None)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, base: BaseLinear) -> torch.Tensor:
        ctx.base = base
        return base(x_TD)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        return outer[0] @ ctx.base.dense_weight(), None
