"""Memory-efficient norms and gated MLPs: they keep less for the backward pass than the model's own.

No family is named here. A module is a candidate by its shape (one weight and an epsilon; gate, up and down
projections and an activation), and is replaced only if the replacement gives the same bits forward and the
same gradient on random input. What differs in any way stays as it is. Parameters and their names stay too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from lowrank.kernels.fused import plain_only
from lowrank.kernels.gated import gated
from lowrank.kernels.rms_norm import Kind, rms_norm

_ROWS = 3
_SMALL = {"gate_proj": (48, 80), "up_proj": (48, 80), "down_proj": (80, 48)}
"""(D, O) of linear layers that stand in for packed ones."""
Forward = Callable[[torch.Tensor], torch.Tensor]


class MemoryEfficientNorm(nn.Module):
    """An RMSNorm over the parameter of the one it replaces."""

    def __init__(self, norm: nn.Module, eps: float, kind: Kind) -> None:
        super().__init__()
        assert isinstance(norm.weight, nn.Parameter)
        self.weight = norm.weight
        self.width = len(norm.weight)
        self.eps = eps
        self.kind: Kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.kind)


class MemoryEfficientMLP(nn.Module):
    """A gated MLP over the layers of the one it replaces."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.width: int = mlp.gate_proj.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.act_fn))


Same = Callable[[nn.Module, MemoryEfficientNorm | MemoryEfficientMLP], bool]


def use_memory_efficient_modules(model: nn.Module, same: Same | None = None) -> int:
    """Replace what can be replaced, in place; how many modules were. `same` tells whether a replacement is one."""
    device = next((each.device for each in model.parameters() if not each.is_meta), None)
    same = same or partial(same_bits, device=device)
    candidates = [(name, replacement) for name, module in model.named_modules() for replacement in _candidates(module)]
    replaced = set()
    for name, replacement in candidates:
        if name not in replaced and same(model.get_submodule(name), replacement):
            model.set_submodule(name, replacement.train(model.training))
            replaced.add(name)
    return len(replaced)


def _candidates(module: nn.Module) -> Sequence[MemoryEfficientNorm | MemoryEfficientMLP]:
    """What might compute the same as `module`."""
    parameters, children = dict(module.named_parameters(recurse=False)), dict(module.named_children())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if parameters.keys() == {"weight"} and not children and isinstance(eps, float) and module.weight.ndim == 1:
        return [MemoryEfficientNorm(module, eps, kind) for kind in get_args(Kind)]
    if not parameters and children.keys() - {"act_fn"} == {"gate_proj", "up_proj", "down_proj"}:
        projections = [children[name] for name in ("gate_proj", "up_proj", "down_proj")]
        act = getattr(module, "act_fn", None)
        plain = not isinstance(act, nn.Module) or not list(act.parameters())
        if callable(act) and plain and all(_is_linear(each) for each in projections):
            return [MemoryEfficientMLP(module)]
    return []


def _is_linear(module: nn.Module) -> bool:
    """A plain layer, or one in any storage."""
    return type(module) is nn.Linear or hasattr(module, "dense_weight")


def same_bits(
    module: nn.Module, replacement: MemoryEfficientNorm | MemoryEfficientMLP, device: torch.device | None = None
) -> bool:
    """Equal bits forward, and an input gradient equal to rounding. Not tried on the meta device. `device`: where it
    computes, of a module whose own tensors do not say."""
    if isinstance(replacement, MemoryEfficientMLP) and _is_packed(replacement):
        module = _with_small_linears(module, device or replacement.gate_proj.dense_weight().device)
        replacement = MemoryEfficientMLP(module)
    weight = next(module.parameters(), None)
    assert weight is not None
    if weight.device.type == "meta":
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, replacement.width, generator=generator).to(weight)
    dy = torch.randn(_ROWS, replacement.width, generator=generator).to(weight)
    try:
        with plain_only():  # Triton's bodies are held to the plain ones by themselves (kernels/fused.py)
            (theirs, own), (their_dx, own_dx) = zip(_run(module, x, dy), _run(replacement, x, dy))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it wants other inputs than hidden states
    scale = their_dx.abs().max()
    return torch.equal(theirs, own) and bool((their_dx - own_dx).abs().max() <= 4 * torch.finfo(x.dtype).eps * scale)


def _is_packed(mlp: MemoryEfficientMLP) -> bool:
    return any(type(each) is not nn.Linear for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))


def _with_small_linears(mlp: Any, device: torch.device) -> nn.Module:
    """The module with other linear layers: what it computes around them is in question. Packed ones need not be
    unpacked for it, nor be read from their file."""
    small = copy.copy(mlp)
    small._modules = dict(mlp._modules)  # a copy has the same dictionary
    dtypes = (getattr(each, "dtype", None) for each in mlp.children())
    dtype = next((each for each in dtypes if each is not None), torch.float32)
    random = torch.Generator().manual_seed(1)
    for name, (columns, rows) in _SMALL.items():
        linear = nn.Linear(columns, rows, bias=getattr(mlp, name).bias is not None, device=device, dtype=dtype)
        for parameter in linear.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) / columns**0.5)
        small.add_module(name, linear.requires_grad_(False))
    return small


def _run(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        y = module(leaf)
    if y.shape != dy.shape:
        raise ValueError("not a map of hidden states to hidden states")
    (dx,) = torch.autograd.grad(y, leaf, dy)
    return y.detach(), dx
