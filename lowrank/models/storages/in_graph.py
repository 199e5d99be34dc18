"""Packed layers in compiled decoder layers: one operator, `lowrank::packed_product`, that no compiler looks into.

It is given the layer's tensors and a name of all else that the layer is (its class, shape, dtype, bits ...), so that
layers alike share what was compiled, and a CUDA graph stays right. Within it the layer computes as it always does, by C
or Triton: traced, its loops over rows would be a graph of their own for every matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowrank.kernels.scratch import fresh_memory
from lowrank.models.storages.packed import PackedLinear

_ROWS_TRIED = (1, 32)
"""One by the kernels for few rows, one by those for many."""
_LAYERS: dict[str, tuple[PackedLinear, tuple[str, ...], int]] = {}
"""By name: a layer without tensors, the names of its tensors, and O."""


def put_in_graphs(model: nn.Module) -> None:
    """Let compiled layers of `model` call its packed layers as operators, each kind of which has run once before: what
    a kernel allocates for good must not lie in the memory of a CUDA graph."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and layer.in_graph is None and not list(layer.parameters()):
            kind = _kind_of(layer)
            if kind not in _LAYERS:
                _LAYERS[kind] = _without_tensors(layer), tuple(_tensors_of(layer)), layer.out_features
                device = next(iter(_tensors_of(layer).values())).device
                with torch.no_grad():
                    for rows in _ROWS_TRIED:
                        layer(torch.zeros(rows, layer.in_features, dtype=layer.dtype, device=device))
            layer.in_graph = kind, packed_product


def packed_product(x: torch.Tensor, layer: PackedLinear, kind: str) -> torch.Tensor:
    """What `layer` makes of x, (..., D) -> (..., O), without gradient, as one operator."""
    return torch.ops.lowrank.packed_product(x, list(layer.buffers()), kind)


def _product(x: torch.Tensor, tensors: list[torch.Tensor], kind: str) -> torch.Tensor:
    like, names, _ = _LAYERS[kind]
    layer = _without_tensors(like)
    vars(layer)["_buffers"].update(zip(names, tensors, strict=True))
    if x.device.type == "cpu":
        return layer.product(x)
    with fresh_memory():
        return layer.product(x)


def _like_product(x: torch.Tensor, tensors: list[torch.Tensor], kind: str) -> torch.Tensor:
    del tensors
    return x.new_empty(*x.shape[:-1], _LAYERS[kind][2])


_OPERATORS = torch.library.Library("lowrank", "FRAGMENT")
"""Not `custom_op`, which costs 40 us of Python in every call."""
_OPERATORS.define("packed_product(Tensor x, Tensor[] tensors, str kind) -> Tensor")
_OPERATORS.impl("packed_product", _product, "CompositeExplicitAutograd")
torch.library.register_fake("lowrank::packed_product", _like_product, lib=_OPERATORS)


def _tensors_of(layer: PackedLinear) -> dict[str, torch.Tensor]:
    return dict(layer.named_buffers())


def _without_tensors(layer: PackedLinear) -> PackedLinear:
    """A copy that has no buffers of its own; cheap, for every call makes one."""
    copied: Any = object.__new__(type(layer))
    copied.__dict__ = {**layer.__dict__, "_buffers": dict.fromkeys(vars(layer)["_buffers"]), "in_graph": None}
    return copied


def _kind_of(layer: PackedLinear) -> str:
    kind = type(layer)
    plain = {name: each for name, each in vars(layer).items() if not name.startswith("_")}
    tensors = {name: (each.dtype, each.ndim) for name, each in _tensors_of(layer).items()}
    return f"{kind.__module__}.{kind.__qualname__} {sorted(plain.items())} {tensors}"
