"""The merged model as a GPTQ checkpoint (the layout of AutoGPTQ and GPTQModel): 2, 3, 4 or 8 bits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from lowrank.export import Tolerance
from lowrank.export.quantize.packed import PackedSettings, PackedTarget, group_size_for, group_size_problem
from lowrank.kernels.bit_packing import to_bit_stream
from lowrank.quantization.compensated import Even, quantize_matrix

_KL = {2: 3.0, 3: 0.8, 4: 0.2, 8: 1e-2}
_AGREEMENT = {2: 0.1, 3: 0.4, 4: 0.6, 8: 0.9}


class GPTQExportConfig(PackedSettings):
    """The merged model as a GPTQ checkpoint."""

    type: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    """Of a weight."""
    group_size: int = 0
    """Inputs that share a scale; -1: all of a row. 0: the largest of 128, 64 and 32 that divides every layer."""
    symmetric: bool | None = None
    """The zero in the middle of each group's range, which the fast kernels for 4 and 8 bits want. Left out: so at 4 and
    8 bits, while 2 and 3 bits, which need every level, have zeros of their own."""

    def build(self) -> PackedTarget:
        """A `PackedTarget` that packs by `GptqFormat`, with these settings; nothing is written before `write`."""
        return PackedTarget(GptqFormat(self), self.type)


class GptqFormat:
    """See the module."""

    def __init__(self, settings: GPTQExportConfig) -> None:
        self.settings = settings
        self.bits = settings.bits + (16 + settings.bits) / 32
        self.symmetric = settings.bits in (4, 8) if settings.symmetric is None else settings.symmetric
        kl = _KL[settings.bits]
        self.tolerance = Tolerance(
            mean_kl=kl, top1_agreement=_AGREEMENT[settings.bits], perplexity=kl if settings.bits > 3 else 20.0,
            remedy="take more bits, or give calibration=FILE",
        )  # fmt: skip
        self._size = settings.group_size

    def incompatibility(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Groups and words must be whole."""
        self._size = group_size_for(shapes, self.settings.group_size)
        fields = 32 if self.settings.bits == 3 else 32 // self.settings.bits
        odd = [name for name, shape in shapes.items() if shape[0] % fields or shape[1] % fields]
        described = [
            f"{name} is {shapes[name]}: at {self.settings.bits} bits both must be multiples of {fields}"
            for name in odd[:1]
        ]
        return [*group_size_problem(shapes, self._size), *described]

    def pack(
        self, weight_OD: torch.Tensor, moment_DD: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """qweight, qzeros (less one), scales, g_idx."""
        del dtype
        bits, columns = self.settings.bits, weight_OD.shape[1]
        size = self._size if self._size > 0 else columns
        groups, value_OD = quantize_matrix(weight_OD, Even(bits, self.symmetric), size, moment_DD)
        tensors = {
            "qweight": to_bit_stream(groups.code_OD, bits).t(),
            "qzeros": to_bit_stream(groups.zero_OG.t() - 1, bits),
            "scales": groups.scale_OG.t().half(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // size,
        }
        return tensors, value_OD

    def describe(
        self, shapes: Mapping[str, tuple[int, int]], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """quantize_config.json's keys; `dynamic` names what is beside a language model, by GPTQModel's expressions."""
        del dtype
        kept = [name for name in others if not name.endswith("head")]
        parts = sorted({name.removeprefix("model.").partition(".")[0] for name in kept})
        pattern = rf"(.*\.)?({'|'.join(map(re.escape, parts))})\..*"
        assert not (parts and any(re.fullmatch(pattern, name) for name in shapes)), (parts, shapes)
        return {
            **({"dynamic": {f"-:{pattern}": {}}} if parts else {}),
            "quant_method": "gptq", "bits": self.settings.bits, "group_size": self._size, "sym": self.symmetric,
            "desc_act": False, "checkpoint_format": "gptq", "lm_head": False, "damp_percent": 0.01,
        }  # fmt: skip

    def usage(self, path: str, example: str) -> str:
        """With vLLM and transformers."""
        del example
        return f"```\nvllm serve {path}\n```\n\nTransformers loads it too, with `pip install gptqmodel`."
