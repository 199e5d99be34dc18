"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 2, 3, 4 or 8 bits, symmetric or not, any order of activation.

Of a linear (D in, O out, G groups): qweight (D * bits / 32, O) int32, a little-endian bit stream down each
column; qzeros (G, O * bits / 32) int32, a stream along each row; scales (G, O); g_idx (D,), the group of
each input. w = (code - zero) * scale. Files of version 1 hold zero - 1, files of `gptq_v2` the zero itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.errors import ModelError
from lowrank.kernels.bit_packing import from_bit_stream
from lowrank.models.prequantized.checks import (
    FLOATS,
    INTEGERS,
    WAY_OUT,
    one_of,
    same_everywhere,
    scattered,
    take,
)
from lowrank.models.storages.affine import AffineLinear

METHODS = ("gptq",)
BITS = (2, 3, 4, 8)
_ONE_IN_EACH_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def reader(quantization_config: Mapping[str, Any]) -> GptqReader:
    """Raises ModelError for other widths, and for layouts made for one kernel (marlin, planar, BitBLAS)."""
    bits = one_of(quantization_config, "bits", BITS, 4)
    # what the file calls its layout has had two names
    key = "checkpoint_format" if "checkpoint_format" in quantization_config else "format"
    layout = one_of(quantization_config, key, ("gptq", "gptq_v2"), "gptq")
    if quantization_config.get("is_marlin_format"):
        raise ModelError(
            f"config.json: the checkpoint's weights are ordered for the Marlin GPU kernel, not read here. {WAY_OUT}"
        )
    return GptqReader(bits, zero_less_one=layout == "gptq")


@dataclass(frozen=True)
class GptqReader:
    """See the module. Layers of other widths (`dynamic`) are recognized by their shapes."""

    bits: int
    zero_less_one: bool
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    notice: str | None = None

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> AffineLinear:
        """The linear, packed anew in memory with the same codes."""
        qweight_WO = take(name, tensors, "qweight", INTEGERS, (None, None))
        words, out_features = qweight_WO.shape
        g_idx_D = tensors.get("g_idx")
        in_features = g_idx_D.numel() if g_idx_D is not None else words * 32 // self.bits
        bits, rest = divmod(words * 32, in_features)
        if rest or bits not in BITS:
            raise ModelError(
                f"{name}.qweight: {words} words for {in_features} inputs are {words * 32 / in_features:.2f} bits a "
                f"weight; lowrank reads GPTQ of {', '.join(map(str, BITS))} bits. {WAY_OUT}"
            )
        scale_GO = take(name, tensors, "scales", FLOATS, (None, out_features))
        groups = scale_GO.shape[0]
        zero_words = -(-out_features * bits // 32)
        qzeros_GW = take(name, tensors, "qzeros", INTEGERS, (groups, zero_words))
        size = -(-in_features // groups)
        return AffineLinear(
            from_bit_stream(qweight_WO.t().contiguous(), bits, in_features),
            bits,
            scale_GO.t(),
            same_everywhere(self._zeros(qzeros_GW, bits, out_features).t()),
            size,
            bias,
            dtype,
            scattered(name, "g_idx", g_idx_D, in_features, groups, size),
        )

    def _zeros(self, qzeros_GW: torch.Tensor, bits: int, count: int) -> torch.Tensor:
        """Zero points (G, O). A zero point of 0 less one borrows from its neighbor in the word, so words are added."""
        if not self.zero_less_one:
            return from_bit_stream(qzeros_GW, bits, count)
        if bits in _ONE_IN_EACH_FIELD:
            wide_GW = qzeros_GW.to(torch.int64) + _ONE_IN_EACH_FIELD[bits]
            wide_GW = wide_GW & 0xFFFFFFFF
            return from_bit_stream((wide_GW - ((wide_GW >> 31) << 32)).to(torch.int32), bits, count)
        return (from_bit_stream(qzeros_GW, bits, count) + 1) & ((1 << bits) - 1)  # 3 bits: by field, as they write it
