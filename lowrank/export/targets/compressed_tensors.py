"""The merged model in vLLM's own format (compressed-tensors, pack-quantized): W4A16 and W8A16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from lowrank.export import Tolerance
from lowrank.export.quantize.packed import PackedSettings, PackedTarget, group_size_for, group_size_problem
from lowrank.kernels.bit_packing import to_bit_stream
from lowrank.quantization.compensated import Even, quantize_matrix

_TOLERANCE = {
    4: Tolerance(mean_kl=0.2, top1_agreement=0.6, perplexity=0.2, remedy="take bits=8, or give calibration=FILE"),
    8: Tolerance(mean_kl=1e-2, top1_agreement=0.9, perplexity=1e-2),
}


class CompressedTensorsExportConfig(PackedSettings):
    """The merged model for vLLM (compressed-tensors)."""

    type: Literal["compressed_tensors"] = "compressed_tensors"
    bits: Literal[4, 8] = 4
    """Of a weight; activations stay in 16 bits (W4A16, W8A16)."""
    group_size: int = 0
    """Inputs that share a scale; -1: all of a row. 0: the largest of 128, 64 and 32 that divides every layer."""

    def build(self) -> PackedTarget:
        """A `PackedTarget` that packs by `CompressedFormat`, with these settings; nothing is written before `write`."""
        return PackedTarget(CompressedFormat(self), self.type)


class CompressedFormat:
    """See the module."""

    def __init__(self, settings: CompressedTensorsExportConfig) -> None:
        self.settings = settings
        self.bits = settings.bits + 16 / 32
        self.tolerance = _TOLERANCE[settings.bits]
        self._size = settings.group_size

    def incompatibility(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Groups must be whole."""
        self._size = group_size_for(shapes, self.settings.group_size)
        return group_size_problem(shapes, self._size)

    def pack(
        self, weight_OD: torch.Tensor, moment_DD: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """weight_packed, weight_scale, weight_shape."""
        rows, columns = weight_OD.shape
        grid = Even(self.settings.bits, dtype=dtype)
        groups, value_OD = quantize_matrix(weight_OD, grid, self._size if self._size > 0 else columns, moment_DD)
        tensors = {
            "weight_packed": to_bit_stream(groups.code_OD, self.settings.bits),
            "weight_scale": groups.scale_OG.to(dtype),
            "weight_shape": torch.tensor([rows, columns]),
        }
        return tensors, value_OD

    def describe(
        self, shapes: Mapping[str, tuple[int, int]], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """One group of schemes for all linear layers but `others`."""
        del shapes, dtype
        channel = self._size < 0
        weights = {
            "num_bits": self.settings.bits, "type": "int", "symmetric": True, "dynamic": False,
            "strategy": "channel" if channel else "group", "group_size": None if channel else self._size,
        }  # fmt: skip
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": list(others),
        }

    def usage(self, path: str, example: str) -> str:
        """With vLLM."""
        del example
        return f"```\nvllm serve {path}\n```\n\nTransformers loads it too, with `pip install compressed-tensors`."
