"""8-bit float checkpoints: `fp8` (DeepSeek, Qwen: a scale for each block of 128 x 128) and `fbgemm_fp8` (one a row).

Of a linear: weight (O, D) float8_e4m3fn and weight_scale_inv (by block, float32 or float8_e8m0fnu; one number where
weight_block_size is null), or weight_scale (O, 1). w = weight * scale. Scales of activations are left out: the base
computes with activations in full precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.models.prequantized.checks import FLOATS, one_of, take
from lowrank.models.storages.float8 import FLOAT8, Float8Linear

METHODS = ("fp8", "fbgemm_fp8")


def reader(quantization_config: Mapping[str, Any]) -> Float8Reader:
    """Raises ModelError for e5m2 and for experts in 4-bit floats."""
    one_of(quantization_config, "fmt", ("e4m3",), "e4m3")
    one_of(quantization_config, "expert_dtype", ("fp8",), "fp8")
    block = quantization_config.get("weight_block_size", (128, 128))
    if quantization_config["quant_method"] == "fbgemm_fp8":
        block = None
    return Float8Reader(None if block is None else (int(block[0]), int(block[1])))


@dataclass(frozen=True)
class Float8Reader:
    """See the module."""

    block: tuple[int, int] | None
    suffixes: tuple[str, ...] = (
        "weight",
        "weight_scale_inv",
        "weight_scale",
        "activation_scale",
        "input_scale",
        "input_scale_ub",
    )
    notice: str | None = None

    @property
    def as_stored(self) -> Mapping[str, str]:
        """See KeepsBytes."""
        return {"weight": "codes"}

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> Float8Linear:
        """The linear, its bytes as they are in the file."""
        weight_OD = take(name, tensors, "weight", (FLOAT8,), (None, None))
        suffix = "weight_scale" if "weight_scale" in tensors else "weight_scale_inv"
        scale = take(name, tensors, suffix, (*FLOATS, torch.float8_e8m0fnu)).float()
        if scale.numel() == 1 and self.block is None:
            scale = scale.reshape(1, 1)
        elif scale.ndim == 1:
            scale = scale[:, None]
        return Float8Linear(name, weight_OD, scale, self.block, bias, dtype)
