"""AQLM checkpoints: 1x16 and any other number of codebooks. Loaded and trained on; never made here (a day on an A100).

Of a linear: codes (O / H, D / W, K) int8 or int16, codebooks (K, 2^bits, H, W), scales (O / H, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.models.prequantized.checks import FLOATS, one_of, take
from lowrank.models.storages.additive import AdditiveLinear

METHODS = ("aqlm",)


def reader(quantization_config: Mapping[str, Any]) -> AqlmReader:
    """Raises ModelError for codebooks of more than 2^16 entries."""
    bits = one_of(quantization_config, "nbits_per_codebook", range(1, 17), 16)
    return AqlmReader(
        int(quantization_config.get("num_codebooks", 1)),
        int(bits),
        int(quantization_config.get("out_group_size", 1)),
        int(quantization_config.get("in_group_size", 8)),
    )


@dataclass(frozen=True)
class AqlmReader:
    """See the module."""

    codebooks: int
    bits: int
    height: int
    width: int
    suffixes: tuple[str, ...] = ("codes", "codebooks", "scales")
    notice: str | None = None

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> AdditiveLinear:
        """The linear, its codes as they are in the file."""
        codebook_KCHW = take(
            name, tensors, "codebooks", FLOATS, (self.codebooks, 1 << self.bits, self.height, self.width)
        )
        whole = torch.int8 if self.bits <= 8 else torch.int16
        code_PQK = take(name, tensors, "codes", (whole,), (None, None, self.codebooks))
        scale = take(name, tensors, "scales", FLOATS, (code_PQK.shape[0], 1, 1, 1))
        return AdditiveLinear(code_PQK, codebook_KCHW, scale.flatten(), bias, dtype)
