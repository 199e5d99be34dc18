"""The merged model as an AWQ checkpoint of 4 bits (AutoAWQ's `gemm` layout), which vLLM and transformers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from lowrank.export import Tolerance
from lowrank.export.quantize.packed import PackedSettings, PackedTarget, group_size_for, group_size_problem
from lowrank.models.prequantized.awq import to_words
from lowrank.quantization.compensated import Even, quantize_matrix
from lowrank.quantization.groups import Groups

_BITS = 4
_PACKING_ORDER = 8


class AWQExportConfig(PackedSettings):
    """The merged model as an AWQ checkpoint of 4 bits."""

    type: Literal["awq"] = "awq"
    group_size: int = 0
    """Inputs that share a scale and a zero point; -1: all of a row. 0: the largest of 128, 64 and 32 that divides every
    layer."""

    def build(self) -> PackedTarget:
        """A `PackedTarget` that packs by `AwqFormat`, with these settings; nothing is written before `write`."""
        return PackedTarget(AwqFormat(self), self.type)


class AwqFormat:
    """See the module."""

    def __init__(self, settings: AWQExportConfig) -> None:
        self.settings = settings
        self.bits = _BITS + (16 + _BITS) / 32
        self.tolerance = Tolerance(
            mean_kl=0.2, top1_agreement=0.6, perplexity=0.2,
            remedy="give calibration=FILE, or take gptq bits=8",
        )  # fmt: skip
        self._size = settings.group_size

    def incompatibility(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Groups and words must be whole."""
        self._size = group_size_for(shapes, self.settings.group_size)
        odd = [name for name, (rows, _) in shapes.items() if rows % _PACKING_ORDER]
        described = [f"{name} has {shapes[name][0]} outputs, which must be a multiple of 8" for name in odd[:1]]
        return [*group_size_problem(shapes, self._size), *described]

    def rounded(self, weight_OD: torch.Tensor, moment_DD: torch.Tensor) -> torch.Tensor:
        """As `pack` does it."""
        return self._quantized(weight_OD, moment_DD)[1]

    def pack(
        self, weight_OD: torch.Tensor, moment_DD: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """qweight, qzeros, scales."""
        del dtype
        groups, value_OD = self._quantized(weight_OD, moment_DD)
        tensors = {
            "qweight": to_words(groups.code_OD.t()),
            "qzeros": to_words(groups.zero_OG.t().to(torch.uint8)),
            "scales": groups.scale_OG.t().half(),
        }
        return tensors, value_OD

    def _quantized(self, weight_OD: torch.Tensor, moment_DD: torch.Tensor | None) -> tuple[Groups, torch.Tensor]:
        size = self._size if self._size > 0 else weight_OD.shape[1]
        return quantize_matrix(weight_OD, Even(_BITS, symmetric=False), size, moment_DD)

    def describe(
        self, shapes: Mapping[str, tuple[int, int]], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """`quantization_config` of config.json, with the fields of transformers' AwqConfig."""
        del shapes, dtype
        return {
            "quant_method": "awq", "bits": _BITS, "group_size": self._size, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": list(others) or None,
        }  # fmt: skip

    def usage(self, path: str, example: str) -> str:
        """With vLLM and transformers."""
        del example
        return f"```\nvllm serve {path}\n```\n\nTransformers loads it too, with `pip install gptqmodel`."
