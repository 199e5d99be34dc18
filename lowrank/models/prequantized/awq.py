"""AWQ checkpoints of 4 bits in the `gemm` layout (AutoAWQ, llm-awq's converter, GPTQModel).

Of a linear: qweight (D, O / 8) int32, qzeros (G, O / 8) int32, scales (G, O). A word holds eight outputs in the
order 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first. w = (code - zero) * scale. Activations need nothing: AWQ's scaling of
them is folded into the layers before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.errors import ModelError
from lowrank.models.prequantized.checks import FLOATS, INTEGERS, one_of, same_everywhere, take
from lowrank.models.storages.affine import AffineLinear

METHODS = ("awq",)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def reader(quantization_config: Mapping[str, Any]) -> AwqReader:
    """Raises ModelError for other widths and for the layouts `gemv`, `gemv_fast`, `marlin`, `exllama`."""
    one_of(quantization_config, "w_bit" if "w_bit" in quantization_config else "bits", (4,), 4)
    for key in ("version", "checkpoint_format", "format"):
        value = quantization_config.get(key)
        if value is not None:
            one_of({**quantization_config, key: str(value).lower()}, key, ("gemm",), "gemm")
    return AwqReader()


@dataclass(frozen=True)
class AwqReader:
    """See the module. The group size follows from the shapes."""

    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    notice: str | None = None

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> AffineLinear:
        """The linear, packed anew in memory with the same codes."""
        qweight_DW = take(name, tensors, "qweight", INTEGERS, (None, None))
        in_features, words = qweight_DW.shape
        scale_GO = take(name, tensors, "scales", FLOATS, (None, words * 8))
        groups = scale_GO.shape[0]
        if in_features % groups:
            raise ModelError(f"{name}.scales: {groups} groups do not divide {in_features} inputs")
        qzeros_GW = take(name, tensors, "qzeros", INTEGERS, (groups, words))
        return AffineLinear(
            _outputs(qweight_DW).t(),
            4,
            scale_GO.t(),
            same_everywhere(_outputs(qzeros_GW).t()),
            in_features // groups,
            bias,
            dtype,
        )


def _outputs(word_NW: torch.Tensor) -> torch.Tensor:
    """Codes (N, O) uint8 of words (N, O / 8)."""
    code_NW8 = torch.empty(*word_NW.shape, 8, dtype=torch.uint8, device=word_NW.device)
    for field, output in enumerate(ORDER):
        code_NW8[:, :, output] = ((word_NW >> (4 * field)) & 15).to(torch.uint8)
    return code_NW8.flatten(1)


def to_words(code_NO: torch.Tensor) -> torch.Tensor:
    """Words (N, O / 8) int32 of codes (N, O), as the files have them."""
    field_NW8 = code_NO.reshape(len(code_NO), -1, 8).to(torch.int64)
    word_NW = torch.zeros(field_NW8.shape[:2], dtype=torch.int64, device=code_NO.device)
    for field, output in enumerate(ORDER):
        word_NW |= field_NW8[:, :, output] << (4 * field)
    return (word_NW - ((word_NW >> 31) << 32)).to(torch.int32)  # as two's complement
