"""HQQ checkpoints in safetensors (the `hqq` package's encoded state, which transformers writes too), axis 1.

Of a linear: W_q, the codes of groups (N, S) packed by halves, quarters ... of the N groups (3 bits: ten codes to
an int32); scale and zero (N, 1); and its settings as little tensors: nbits, group_size, shape, axis, packing.
w = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.errors import ModelError
from lowrank.models.prequantized.checks import FLOATS, WAY_OUT, take
from lowrank.models.storages.affine import AffineLinear

METHODS = ("hqq",)
_FIELDS = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3, 2: 2, 1: 1}
"""Bits that a code takes in the file."""
_WHOLE = (torch.int32, torch.int64, torch.uint8)


def reader(quantization_config: Mapping[str, Any]) -> HqqReader:
    """Raises ModelError where a layer's groups run down the columns (axis 0)."""
    settings = quantization_config.get("quant_config") or {}
    layers = [settings, *(value for value in settings.values() if isinstance(value, Mapping))]
    if any((layer.get("weight_quant_params") or layer).get("axis", 1) != 1 for layer in layers):
        raise ModelError(f"config.json: the HQQ groups run down the columns (axis 0); lowrank reads axis 1. {WAY_OUT}")
    return HqqReader()


@dataclass(frozen=True)
class HqqReader:
    """See the module. Every layer says itself how it is packed."""

    suffixes: tuple[str, ...] = (
        "W_q",
        "scale",
        "zero",
        "nbits",
        "group_size",
        "shape",
        "axis",
        "packing",
        "unpack_view_dtype",
        "view_as_float",
        "quant_scale",
        "quant_zero",
        "compute_dtype",
        "channel_wise",
        "optimize",
        "round_zero",
        "offload_meta",
        "encoded_state_dict",
        "stores_quant_config",
    )
    notice: str | None = None

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> AffineLinear:
        """The linear, packed anew in memory with the same codes, 5 and 6 bits tighter than in the file."""
        bits = int(take(name, tensors, "nbits", (*_WHOLE, torch.float32)))
        axis = int(tensors.get("axis", torch.tensor(1)))
        if bits not in _FIELDS or axis != 1 or int(tensors.get("quant_scale", torch.tensor(0))):
            raise ModelError(
                f"{name}: HQQ of {bits} bits, axis {axis}; lowrank reads {', '.join(map(str, _FIELDS))} bits, axis 1, "
                f"with scales that are not quantized themselves. {WAY_OUT}"
            )
        rows, columns = (int(size) for size in take(name, tensors, "shape", _WHOLE, (2,)))
        scale_N1 = take(name, tensors, "scale", FLOATS, (None, 1))
        count = scale_N1.shape[0]
        zero_N1 = take(name, tensors, "zero", FLOATS, (count, 1))
        if rows * columns % count or columns % (rows * columns // count):
            raise ModelError(f"{name}.scale: {count} groups do not divide the rows of a weight of {(rows, columns)}")
        size = rows * columns // count
        code_NS = _codes(name, tensors.get("W_q"), bits, count, size)
        scale_OG, zero_OG = scale_N1.view(rows, -1), zero_N1.view(rows, -1)
        return AffineLinear(code_NS.view(rows, columns), bits, scale_OG, zero_OG, size, bias, dtype)


def _codes(name: str, packed: torch.Tensor | None, bits: int, count: int, size: int) -> torch.Tensor:
    field = _FIELDS[bits]
    if packed is None:
        raise ModelError(f"{name}.W_q: not in the checkpoint")
    packed = packed.view(torch.int32 if field == 3 else torch.uint8)  # it may have been saved in a float's clothes
    per_word = 10 if field == 3 else 8 // field
    if packed.ndim != 2 or packed.shape[1] != size or packed.shape[0] != -(-count // per_word):
        raise ModelError(
            f"{name}.W_q: its shape is {tuple(packed.shape)}, expected {(-(-count // per_word), size)} at {bits} bits"
        )
    shifts = range((per_word - 1) * field, -1, -field)  # the first part of the groups is in the highest bits
    return torch.cat([(packed >> shift) & ((1 << field) - 1) for shift in shifts])[:count].to(torch.uint8)
