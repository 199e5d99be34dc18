"""act(gate) * up, the middle of a gated MLP (SwiGLU and its kin, arXiv:2002.05202), keeping only gate and up.

Autograd would keep act(gate) as well, and the layer that reads the product would keep the product. Both are computed
again in the backward pass: a pass over memory each, no matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowrank.kernels.fused import plain_only, runs_fused
from lowrank.kernels.rematerialize import rematerialize_with

Activation = Callable[[torch.Tensor], torch.Tensor]


def gated(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """act(gate) * up, all of one shape. `act` must work element by element and have no parameters."""
    if torch.compiler.is_compiling():
        return act(gate) * up
    return rematerialize_with(_Gated.apply(gate, up, act), partial(_product, act=act), gate, up)


def _product(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    kind = _kind_of(act)
    if kind is not None and gate.shape == up.shape and runs_fused(gate, _check):
        from lowrank.kernels.gated_triton import forward_triton

        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        forward_triton(gate, up, kind, out)
        return out
    return act(gate).mul_(up)


def _kind_of(act: Activation) -> str | None:
    """Which of the activations with a Triton body it is, by what torch and transformers call them."""
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    name = type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", "")
    return _NAMES.get(name)


_NAMES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


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
        kind = _kind_of(ctx.act)
        if kind is not None and gate.shape == up.shape and runs_fused(gate, _check):
            from lowrank.kernels.gated_triton import backward_triton

            dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
            backward_triton(gate, up, dy, kind, dgate, dup)
            return dgate, dup, None
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            act = ctx.act(leaf)
        (dgate,) = torch.autograd.grad(act, leaf, dy * up)
        return dgate, act.detach().mul_(dy), None


def _check(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The product and both gradients of the Triton body beside those of this file."""
    from lowrank.kernels.gated_triton import backward_triton, forward_triton

    acts = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
    pairs = []
    for kind, act in acts.items():
        gate, up, dy = (2 * torch.randn(37, 1000, dtype=dtype, device=device) for _ in range(3))
        y, dgate, dup = (torch.empty_like(gate) for _ in range(3))
        forward_triton(gate, up, kind, y)
        backward_triton(gate, up, dy, kind, dgate, dup)
        with plain_only(), torch.enable_grad():
            leaves = gate.requires_grad_(), up.requires_grad_()
            plain: Any = _Gated.apply(*leaves, act)
            plain_dgate, plain_dup = torch.autograd.grad(plain, leaves, dy)
        pairs += [(y, plain.detach()), (dgate, plain_dgate), (dup, plain_dup)]
    return pairs
