"""act(gate) * up, the middle of a gated MLP (SwiGLU and its kin, arXiv:2002.05202), keeping only gate and up.

Autograd would keep act(gate) as well, and the layer that reads the product would keep the product. Both are computed
again in the backward pass: a pass over memory each, no matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lowrank.kernels.recipe import remember

Activation = Callable[[torch.Tensor], torch.Tensor]


def gated(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """act(gate) * up, all of one shape. `act` must work element by element and have no parameters."""
    return remember(_Gated.apply(gate, up, act), partial(_product, act=act), gate, up)


def _product(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    return act(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _product(gate, up, act)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (dy,) = outer
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            act = ctx.act(leaf)
        (dgate,) = torch.autograd.grad(act, leaf, dy * up)
        return dgate, act.detach().mul_(dy), None
