"""act(gate) * up, the middle of a gated MLP (SwiGLU and its kin, arXiv:2002.05202), keeping only gate and up.

Autograd would keep act(gate) as well. It is computed again in the backward pass: one pass over memory, no product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Activation = Callable[[torch.Tensor], torch.Tensor]


def gated(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """act(gate) * up, all of one shape. `act` must work element by element and have no parameters."""
    return _Gated.apply(gate, up, act)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (dy,) = outer
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            act = ctx.act(leaf)
        (dgate,) = torch.autograd.grad(act, leaf, dy * up)
        return dgate, act.detach().mul_(dy), None
