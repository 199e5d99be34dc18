"""What every packed storage shares: y = x W^T + b over a weight that exists whole only while it is used.

Nothing dense is saved for the backward pass: it unpacks once more. There is no second path for
evaluation, so an evaluation leaves nothing behind that training could trip over (two well-known
libraries repack in eval and lose the gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from lowrank.settings import Settings

if TYPE_CHECKING:
    from lowrank.models.storages import BaseLinear

DENSE_MODULES = ("lm_head", "embed_out", "router", "gate", "shared_expert_gate")
"""Heads, and the small layers that choose the experts of a mixture: few bytes, and sensitive to rounding."""


class QuantizedStorage(Settings):
    """Settings that every storage which quantizes while it loads has; a storage adds `type`, its own, and `wrap`."""

    skip_modules: tuple[str, ...] = DENSE_MODULES
    """Linear layers, or the experts of a mixture, that stay in 16 bit, by name or the end of a name. The head and tied
    weights always do."""
    towers: bool = False
    """Pack what is beside the language model too: towers for pictures or sound, and their projectors. Left out, they
    stay in 16 bit: few bytes, and what they see suffers from rounding."""


def is_skipped(name: str, storage: Any) -> bool:
    """Whether the settings keep the module of this full name dense."""
    skipped = storage.skip_modules if isinstance(storage, QuantizedStorage) else ()
    return any(name == skip or name.endswith(f".{skip}") for skip in skipped)


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The weight of an `nn.Linear`, or of a transformers `Conv1D` (GPT-2 keeps it as (D, O)), as (O, D)."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach() if isinstance(linear, nn.Linear) else weight.detach().t()


def bias_of(linear: nn.Module) -> torch.Tensor | None:
    """Its bias, if it has one."""
    bias = getattr(linear, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None


class PackedLinear(nn.Module):
    """A frozen `BaseLinear`; a storage adds its buffers and `dense_weight`."""

    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias_O: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().to(dtype))
        self.in_graph: tuple[str, Callable[[torch.Tensor, PackedLinear, str], torch.Tensor]] | None = None
        """How a compiled layer calls it (in_graph.py)."""

    def dense_weight(self) -> torch.Tensor:
        """W as (O, D) in `self.dtype`, in scratch memory: good until the next call."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in memory of its own, for model code that takes a layer apart (Mamba); slow, and right."""
        return self.dense_weight().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., O), in the dtype of `x`."""
        if self.in_graph is not None and torch.compiler.is_compiling():
            kind, product = self.in_graph
            return product(x, self, kind)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """`forward`, as it is computed; a storage may have a faster way."""
        return frozen_product(x, self)

    def extra_repr(self) -> str:
        """As torch prints a linear layer."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.dtype}"


def frozen_product(x: torch.Tensor, linear: BaseLinear) -> torch.Tensor:
    """x W^T + b, (..., D) -> (..., O). The gradient reaches `x`; the weight is unpacked anew for it."""
    return _FrozenProduct.apply(x, linear)  # pyright: ignore[reportReturnType]


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: BaseLinear) -> torch.Tensor:
        ctx.linear = linear
        bias = getattr(linear, "bias", None)
        return F.linear(x, linear.dense_weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (dy,) = outer
        return (dy @ ctx.linear.dense_weight().to(dy.dtype) if ctx.needs_input_grad[0] else None), None
