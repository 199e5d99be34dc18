"""RMSNorm (arXiv:1910.07467) that keeps its input and one number a row for the backward pass, nothing else.

transformers writes it as a chain of operations; autograd then keeps three float32 copies of the hidden
states for every norm, in a 0.5 B model a third of all that is kept. The forward pass here rounds where theirs
rounds, so its results are theirs bit for bit.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from lowrank.kernels.fused import plain_only, runs_fused

_WIDEST_ROW = 32_768
"""On a GPU a row lies in the registers of one program (rms_norm_triton.py)."""
_BLOCK_BYTES = 1 << 20
"""On a CPU rows are done in blocks whose float32 copies stay in the cache."""


Kind = Literal["llama", "olmo2", "gemma"]
"""What transformers' families differ in. llama (most of them): rounded to the dtype of x before the weight comes on.
olmo2 (gpt-oss too): after. gemma: after, and the factor is 1 + weight."""


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float, kind: Kind = "llama") -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32: (..., D) -> (..., D) in the dtype of `x`."""
    if torch.compiler.is_compiling():
        return _written_out(x, weight_D, eps, kind)
    return _RmsNorm.apply(x, weight_D, eps, kind)


def _factor(weight_D: torch.Tensor, kind: Kind) -> torch.Tensor:
    return weight_D if kind == "llama" else weight_D.float() + (kind == "gemma")


def _written_out(x: torch.Tensor, weight_D: torch.Tensor, eps: float, kind: Kind) -> torch.Tensor:
    """For a compiler, which makes one pass of it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (_factor(weight_D, kind) * (wide.to(x.dtype) if kind == "llama" else wide)).to(x.dtype)


def _blocks(x_ND: torch.Tensor) -> list[slice]:
    each = max(1, _BLOCK_BYTES // (4 * x_ND.shape[1])) if x_ND.device.type == "cpu" else max(1, len(x_ND))
    return [slice(first, first + each) for first in range(0, len(x_ND), each)]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float, kind: Kind) -> torch.Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # no view is returned: models may add to it in place
        y_ND = y.view(x_ND.shape)
        inverse_N1 = torch.empty(len(x_ND), 1, dtype=torch.float32, device=x.device)
        if x_ND.shape[1] <= _WIDEST_ROW and runs_fused(x_ND, _check):
            from lowrank.kernels.rms_norm_triton import forward_triton

            forward_triton(x_ND, weight_D, eps, kind, y_ND, inverse_N1)
            ctx.save_for_backward(x_ND, weight_D, inverse_N1)
            ctx.kind = kind
            return y
        factor_D = _factor(weight_D, kind)
        for rows in _blocks(x_ND):
            wide = x_ND[rows].float()
            inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            inverse_N1[rows] = inverse
            wide = wide * inverse
            y_ND[rows] = factor_D * (wide.to(x.dtype) if kind == "llama" else wide)
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        ctx.kind = kind
        return y

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        (dy,) = outer
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        dy_ND = dy.reshape(x_ND.shape)
        dx_ND = torch.empty_like(x_ND)
        if not ctx.needs_input_grad[1] and x_ND.shape[1] <= _WIDEST_ROW and runs_fused(x_ND, _check):
            from lowrank.kernels.rms_norm_triton import backward_triton

            backward_triton(x_ND, weight_D, dy_ND, inverse_N1, ctx.kind, dx_ND)
            return dx_ND.view(dy.shape), None, None, None
        factor_D = _factor(weight_D, ctx.kind).float()
        dweight_D = torch.zeros_like(factor_D) if ctx.needs_input_grad[1] else None
        for rows in _blocks(x_ND):
            unit = x_ND[rows].to(torch.float32, copy=True).mul_(inverse_N1[rows])  # float() of float32 is x itself
            inner = dy_ND[rows].float()
            if dweight_D is not None:
                dweight_D += (inner * (unit.to(x_ND.dtype) if ctx.kind == "llama" else unit)).sum(0)
            inner = inner * factor_D
            share = (inner * unit).mean(-1, keepdim=True)
            dx_ND[rows] = inner.sub_(unit.mul_(share)).mul_(inverse_N1[rows])
        dweight = dweight_D.to(weight_D.dtype) if dweight_D is not None else None
        return dx_ND.view(dy.shape), dweight, None, None


def _check(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """y and dx of the Triton body beside those of this file."""
    from lowrank.kernels.rms_norm_triton import backward_triton, forward_triton

    pairs = []
    for kind in get_args(Kind):
        x_ND, dy_ND = (torch.randn(37, 1000, dtype=dtype, device=device) for _ in range(2))
        weight_D = torch.randn(1000, dtype=dtype, device=device)
        y_ND, dx_ND, inverse_N1 = torch.empty_like(x_ND), torch.empty_like(x_ND), x_ND.new_empty(37, 1).float()
        forward_triton(x_ND, weight_D, 1e-6, kind, y_ND, inverse_N1)
        backward_triton(x_ND, weight_D, dy_ND, inverse_N1, kind, dx_ND)
        with plain_only(), torch.enable_grad():
            leaf_ND = x_ND.requires_grad_()
            plain_ND = rms_norm(leaf_ND, weight_D, 1e-6, kind)
            (plain_dx_ND,) = torch.autograd.grad(plain_ND, leaf_ND, dy_ND)
        pairs += [(y_ND, plain_ND.detach()), (dx_ND, plain_dx_ND)]
    return pairs
