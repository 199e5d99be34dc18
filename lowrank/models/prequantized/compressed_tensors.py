"""compressed-tensors checkpoints (llm-compressor, vLLM's own format): integers of 1 to 8 bits and 8-bit floats.

pack-quantized: weight_packed (O, D * bits / 32) int32, a little-endian bit stream of code + 2^(bits-1); weight_scale
(O, G); weight_shape; weight_zero_point packed down the columns where asymmetric; weight_g_idx (D,).
int-quantized, naive-quantized: weight int8, weight_scale, weight_zero_point int8.
float-quantized: weight float8_e4m3fn, weight_scale by tensor, channel or block.
w = (code - zero) * scale. Where activations were to be quantized too, only the weights are used; the notice says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank.errors import ModelError
from lowrank.kernels.bit_packing import from_bit_stream
from lowrank.models.prequantized.checks import FLOATS, INTEGERS, WAY_OUT, one_of, same_everywhere, scattered, take
from lowrank.models.storages.affine import AffineLinear
from lowrank.models.storages.float8 import FLOAT8, Float8Linear

METHODS = ("compressed-tensors",)
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
_FORMATS_OF_A_MODEL = (*FORMATS, "mixed-precision", "dense")


def reader(quantization_config: Mapping[str, Any]) -> CompressedReader:
    """Raises ModelError for sparse, rotated and 4-bit float (NVFP4, MXFP4) checkpoints."""
    one_of(quantization_config, "format", _FORMATS_OF_A_MODEL, "pack-quantized")
    groups = quantization_config.get("config_groups") or {}
    problems = []
    for label, group in groups.items():
        weights = group.get("weights") or {}
        layout = group.get("format") or quantization_config.get("format")
        if layout not in _FORMATS_OF_A_MODEL:
            problems.append(f"{label} has format {layout!r}")
        if weights.get("type", "int") == "float" and weights.get("num_bits") != 8:
            problems.append(f"{label} has floats of {weights.get('num_bits')} bits")
    sparse = (quantization_config.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        problems.append(f"its weights are sparse ({sparse})")
    if (quantization_config.get("transform_config") or {}).get("config_groups"):
        problems.append("its weights are rotated (transform_config)")
    if problems:
        raise ModelError(
            f"config.json: quantization_config cannot be read: {'; '.join(problems)}. lowrank reads integers of 1 to 8 "
            f"bits and floats of 8 ({', '.join(FORMATS)}). {WAY_OUT}"
        )
    acting = any(group.get("input_activations") for group in groups.values())
    notice = (
        "the checkpoint was made to quantize activations too; lowrank uses its weights and computes with activations "
        "in full precision, so adapters learn from exact gradients"
    )
    widths = {int((group.get("weights") or {}).get("num_bits") or 8) for group in groups.values()} or {4, 8}
    return CompressedReader(tuple(sorted(widths)), notice if acting else None)


@dataclass(frozen=True)
class CompressedReader:
    """See the module. Groups and layout follow from the tensors, so layers of several schemes may be mixed."""

    widths: tuple[int, ...]
    """Bits that the schemes of the checkpoint use."""
    notice: str | None = None
    suffixes: tuple[str, ...] = (
        "weight_packed",
        "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
    )

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """The linear: packed integers, or 8-bit floats as they are."""
        if "weight_packed" in tensors:
            return _packed(name, tensors, self.widths, bias, dtype)
        weight_OD = take(name, tensors, "weight", (torch.int8, FLOAT8), (None, None))
        scale = take(name, tensors, "weight_scale", FLOATS)
        scale_OG = scale.reshape(1, 1) if scale.numel() == 1 else scale
        if weight_OD.dtype == FLOAT8:
            return Float8Linear(name, weight_OD, scale_OG, None, bias, dtype)
        rows, columns = weight_OD.shape
        zero = tensors.get("weight_zero_point")
        scale_OG = scale_OG.expand(rows, -1)
        size = _group_size(name, columns, scale_OG)
        zero_OG = torch.zeros(1, 1, dtype=torch.int16) if zero is None else zero.reshape(-1, scale.shape[-1] or 1)
        return AffineLinear(
            (weight_OD.to(torch.int16) + 128).to(torch.uint8),
            8,
            scale_OG,
            same_everywhere(zero_OG.to(torch.int16) + 128),
            size,
            bias,
            dtype,
            scattered(name, "weight_g_idx", tensors.get("weight_g_idx"), columns, scale_OG.shape[1], size),
        )


def _packed(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    widths: tuple[int, ...],
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> AffineLinear:
    shape = take(name, tensors, "weight_shape", (torch.int64, torch.int32), (2,))
    rows, columns = (int(size) for size in shape)
    packed_OW = take(name, tensors, "weight_packed", INTEGERS, (rows, None))
    words = packed_OW.shape[1]
    fitting = [bits for bits in widths if words == -(-columns * bits // 32)]
    if len(fitting) != 1:
        raise ModelError(
            f"{name}.weight_packed: {words} words for {columns} inputs do not fit the {' or '.join(map(str, widths))} "
            "bits of config.json without gaps (older versions of compressed-tensors left some at 3, 5, 6 and 7 bits: "
            f"write it again with a newer one). {WAY_OUT}"
        )
    bits = fitting[0]
    scale_OG = take(name, tensors, "weight_scale", FLOATS)
    scale_OG = scale_OG.reshape(1, 1).expand(rows, 1) if scale_OG.numel() == 1 else scale_OG
    if scale_OG.shape[0] != rows:
        raise ModelError(f"{name}.weight_scale: its shape is {tuple(scale_OG.shape)}, expected ({rows}, groups)")
    groups = scale_OG.shape[1]
    size = _group_size(name, columns, scale_OG)
    half = 1 << (bits - 1)
    zero_OG = torch.full((1, 1), half, dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        zero_words = -(-rows * bits // 32)
        zero_WG = take(name, tensors, "weight_zero_point", INTEGERS, (zero_words, groups))
        zero_OG = from_bit_stream(zero_WG.t().contiguous(), bits, rows).t()
    return AffineLinear(
        from_bit_stream(packed_OW, bits, columns),
        bits,
        scale_OG,
        same_everywhere(zero_OG),
        size,
        bias,
        dtype,
        scattered(name, "weight_g_idx", tensors.get("weight_g_idx"), columns, groups, size),
    )


def _group_size(name: str, columns: int, scale_OG: torch.Tensor) -> int:
    groups = scale_OG.shape[-1]
    if columns % groups:
        raise ModelError(f"{name}.weight_scale: {groups} groups do not divide {columns} inputs")
    return columns // groups
