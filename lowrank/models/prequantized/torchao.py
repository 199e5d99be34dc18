"""torchao checkpoints of 8-bit integers (`Int8WeightOnlyConfig`, version 2, in safetensors).

Of a linear: _weight_qdata (O, D) int8, _weight_scale (O, G), _weight_zero_point like it. w = (code - zero) * scale.
torchao's other types change their layout with its versions, and older files are pickles: not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.errors import ModelError
from lowrank.models.prequantized.checks import FLOATS, WAY_OUT, same_everywhere, take
from lowrank.models.storages.affine import AffineLinear

METHODS = ("torchao",)
_READ = ("Int8WeightOnlyConfig",)


def reader(quantization_config: Mapping[str, Any]) -> TorchaoReader:
    """Raises ModelError for every type but int8 weight-only."""
    kind = (quantization_config.get("quant_type") or {}).get("default") or {}
    if kind.get("_type") not in _READ or kind.get("_version", 1) < 2:
        raise ModelError(
            f"config.json: quantization_config.quant_type is torchao's {kind.get('_type')} version "
            f"{kind.get('_version', 1)}; lowrank reads {_READ[0]} version 2. {WAY_OUT}"
        )
    return TorchaoReader()


@dataclass(frozen=True)
class TorchaoReader:
    """See the module."""

    suffixes: tuple[str, ...] = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
    notice: str | None = None

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> AffineLinear:
        """The linear, a byte a weight."""
        code_OD = take(name, tensors, "_weight_qdata", (torch.int8,), (None, None))
        rows, columns = code_OD.shape
        scale_OG = take(name, tensors, "_weight_scale", FLOATS, (rows, None))
        groups = scale_OG.shape[1]
        if columns % groups:
            raise ModelError(f"{name}._weight_scale: {groups} groups do not divide {columns} inputs")
        zero_OG = torch.zeros(1, 1, dtype=torch.int16)
        if "_weight_zero_point" in tensors:
            zero_OG = take(name, tensors, "_weight_zero_point", (torch.int8,), (rows, groups)).to(torch.int16)
        return AffineLinear(
            (code_OD.to(torch.int16) + 128).to(torch.uint8),
            8,
            scale_OG,
            same_everywhere(zero_OG + 128),
            columns // groups,
            bias,
            dtype,
        )
