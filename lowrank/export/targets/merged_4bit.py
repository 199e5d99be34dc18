"""The merged model in bitsandbytes' 4-bit format (NF4), which transformers, vLLM and lowrank load and train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from lowrank.export import Tolerance
from lowrank.export.quantize.packed import PackedSettings, PackedTarget
from lowrank.kernels.four_bit import CODES, quantize, quantize_scales
from lowrank.models.prequantized.bnb import as_config, as_tensors
from lowrank.models.storages.four_bit import FourBitLinear
from lowrank.quantization.compensated import Levels, quantize_matrix

_CODE = "nf4"
_USAGE = """```python
# pip install bitsandbytes
{example}
```

Or `vllm serve {path}`; `lowrank train ... model={path}` trains on it."""


class Merged4bitExportConfig(PackedSettings):
    """The merged model in 4 bits (NF4)."""

    type: Literal["merged_4bit"] = "merged_4bit"
    block_size: Literal[32, 64, 128, 256] = 64
    """Weights that share a scale. 64 is what others expect; 32 is nearer to the original, for half a bit more."""
    double_quant: bool = True
    """Keep the scales in 8 bits too."""

    def build(self) -> PackedTarget:
        """A `PackedTarget` that packs by `BnbFormat`, with these settings; nothing is written before `write`."""
        return PackedTarget(BnbFormat(self), self.type)


class BnbFormat:
    """See the module."""

    def __init__(self, settings: Merged4bitExportConfig) -> None:
        self.settings = settings
        self.bits = 4 + (8.127 if settings.double_quant else 32) / settings.block_size
        self.tolerance = Tolerance(
            mean_kl=0.15, top1_agreement=0.6, perplexity=0.15, gain_lost=0.01,
            remedy="write it with block_size=32, calibrate it on text like its use (calibration=FILE), or take a form "
            "that loses less: --to gguf --type q8_0, --to merged, or the adapter over the 4-bit base (--to peft)",
        )  # fmt: skip

    def incompatibility(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """None: blocks run over the flattened weight, and the last may be short."""
        del shapes
        return []

    def pack(
        self, weight_OD: torch.Tensor, moment_DD: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Compensated where rows are whole blocks."""
        shape, size = (weight_OD.shape[0], weight_OD.shape[1]), self.settings.block_size
        if moment_DD is not None and shape[1] % size == 0:
            groups, _ = quantize_matrix(weight_OD, Levels(torch.tensor(CODES[_CODE])), size, moment_DD)
            code_N = groups.code_OD.flatten()
            packed, absmax = (code_N[::2] << 4) | code_N[1::2], groups.scale_OG.flatten()
        else:
            packed, absmax = quantize(weight_OD, _CODE, size)
        if self.settings.double_quant:
            scales, nested, offset = quantize_scales(absmax)
            layer = _layer(shape, size, packed, scales, dtype, nested_absmax=nested, offset=offset)
        else:
            layer = _layer(shape, size, packed, absmax, dtype)
        tensors = as_tensors(layer)
        layer.dtype = torch.float32
        return tensors, layer.dense_weight().clone()

    def describe(
        self, shapes: Mapping[str, tuple[int, int]], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """BitsAndBytesConfig."""
        some = torch.zeros(0, dtype=torch.uint8)
        nested = torch.zeros(0) if self.settings.double_quant else None
        layer = _layer((0, 0), self.settings.block_size, some, torch.zeros(0), dtype, nested_absmax=nested)
        return as_config({next(iter(shapes)): layer}, list(others), dtype)

    def usage(self, path: str, example: str) -> str:
        """With transformers, vLLM and lowrank."""
        return _USAGE.format(path=path, example=example)


def _layer(
    shape: tuple[int, int], size: int, packed: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype, **nested: Any
) -> FourBitLinear:
    return FourBitLinear(shape, _CODE, size, packed, absmax, None, dtype, **nested)
