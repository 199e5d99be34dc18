"""8-bit floats (e4m3) with a scale for each block of the matrix: the checkpoints of DeepSeek, Qwen and vLLM."""

from __future__ import annotations

import torch

from lowrank.errors import ModelError
from lowrank.kernels.scratch import scratch
from lowrank.models.storages.packed import PackedLinear

FLOAT8 = torch.float8_e4m3fn
_CPU_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 24


class Float8Linear(PackedLinear):
    """W[o, d] = codes[o, d] * scale[o // height, d // width]; the last block of a row or column has what is left."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        name: str,
        weight_OD: torch.Tensor,
        scale_PQ: torch.Tensor,
        block: tuple[int, int] | None,
        bias_O: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """`block` (height, width), or None: what divides the matrix evenly. Raises ModelError if scales do not fit."""
        out_features, in_features = weight_OD.shape
        super().__init__(in_features, out_features, bias_O, dtype)
        rows, columns = scale_PQ.shape
        self.height, self.width = block or (-(-out_features // rows), -(-in_features // columns))
        if (rows, columns) != (-(-out_features // self.height), -(-in_features // self.width)):
            raise ModelError(
                f"{name}: scales of shape {(rows, columns)} do not fit a weight of {(out_features, in_features)} in "
                f"blocks of {(self.height, self.width)}; config.json's quantization_config is not this file's"
            )
        self.register_buffer("codes", weight_OD)
        self.register_buffer("scale", scale_PQ.float().contiguous())

    def dense_weight(self) -> torch.Tensor:
        """W as (O, D), in scratch memory. Multiplied in float32, rounded once."""
        out_OD = scratch((self.out_features, self.in_features), self.dtype, self.codes.device)
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        size = _CPU_BLOCK if out_OD.device.type == "cpu" else _GPU_BLOCK
        step = max(1, size // self.in_features)
        row_O = torch.arange(self.out_features, device=self.scale.device) // self.height
        whole = self.in_features // self.width
        for first in range(0, self.out_features, step):
            rows = slice(first, first + step)
            weight_ND = self.codes[rows].to(work)
            scale_NQ = self.scale[row_O[rows]].to(work)
            edge = whole * self.width
            if whole:
                weight_ND[:, :edge].unflatten(1, (whole, self.width)).mul_(scale_NQ[:, :whole, None])
            if edge < self.in_features:
                weight_ND[:, edge:].mul_(scale_NQ[:, whole:])
            out_OD[rows].copy_(weight_ND)
        return out_OD
