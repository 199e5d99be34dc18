"""INT8: every row of a weight in steps of 1/127 of its largest value; half the bytes of 16 bit, hardly any error."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from lowrank.kernels.scratch import scratch
from lowrank.models.storages.packed import PackedLinear, QuantizedStorage, bias_of, weight_of
from lowrank.settings import NonNegative


class Int8Config(QuantizedStorage):
    """8 bits per weight, one scale per row (output); arithmetic stays in 16 bit, unlike LLM.int8's."""

    type: Literal["int8"] = "int8"
    outlier_columns: NonNegative = 0
    """Input columns with the largest weights that stay in 16 bit, as LLM.int8 keeps them (Dettmers et al., arXiv
    2208.07339; it picks them by activations): they no longer widen every row's step. 0: plain row-wise."""

    def wrap(self, linear: nn.Module) -> Int8Linear:
        """The layer in 8 bits, on the device its weight is on."""
        weight_OD = weight_of(linear)
        outliers_OK = columns_K = None
        dtype = weight_OD.dtype
        if self.outlier_columns:
            count = min(self.outlier_columns, weight_OD.shape[1])
            columns_K = weight_OD.abs().amax(dim=0).topk(count).indices.sort().values
            outliers_OK = weight_OD[:, columns_K].contiguous()
            weight_OD = weight_OD.index_fill(1, columns_K, 0.0)
        codes_OD, absmax_O = quantize_rows(weight_OD)
        return Int8Linear(codes_OD, absmax_O, bias_of(linear), dtype, columns_K, outliers_OK)

    def bytes_of(self, shape: tuple[int, int], itemsize: int = 2) -> int:
        """What it keeps of a weight of (O, D): codes, a scale for each row, and outliers with their places."""
        outliers = min(self.outlier_columns, shape[1])
        return shape[0] * shape[1] + 4 * shape[0] + outliers * (8 + shape[0] * itemsize)


_CHUNK = 1 << 17


def quantize_rows(weight_OD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 codes (O, D), float32 absolute maximum of each row), as bitsandbytes' int8_vectorwise_quant."""
    absmax_O = weight_OD.abs().amax(dim=1).float()
    factor_O = 127.0 / absmax_O.clamp(min=torch.finfo(torch.float32).tiny)
    codes_OD = torch.empty(weight_OD.shape, dtype=torch.int8, device=weight_OD.device)
    rows = max(1, _CHUNK // weight_OD.shape[1])
    for first in range(0, len(weight_OD), rows):
        part = weight_OD[first : first + rows].float() * factor_O[first : first + rows, None]
        codes_OD[first : first + rows] = part.round_().clamp_(-127, 127)
    return codes_OD, absmax_O


class Int8Linear(PackedLinear):
    """W = codes * absmax / 127, row by row; with some columns as they were."""

    codes: torch.Tensor
    absmax: torch.Tensor
    columns: torch.Tensor | None
    outliers: torch.Tensor | None

    def __init__(
        self,
        codes_OD: torch.Tensor,
        absmax_O: torch.Tensor,
        bias_O: torch.Tensor | None,
        dtype: torch.dtype,
        columns_K: torch.Tensor | None = None,
        outliers_OK: torch.Tensor | None = None,
    ) -> None:
        super().__init__(codes_OD.shape[1], codes_OD.shape[0], bias_O, dtype)
        self.register_buffer("codes", codes_OD)
        self.register_buffer("absmax", absmax_O)
        self.register_buffer("columns", columns_K)
        self.register_buffer("outliers", outliers_OK)

    def dense_weight(self) -> torch.Tensor:
        out = scratch((self.out_features, self.in_features), self.dtype, self.codes.device)
        scale_O1 = (self.absmax / 127.0)[:, None]
        rows = max(1, _CHUNK // self.in_features) if out.device.type == "cpu" else len(out)
        for first in range(0, len(out), rows):  # in pieces that stay in the processor's cache; one type at a time
            part = slice(first, first + rows)
            if out.dtype == torch.float32:  # where it stays: half as fast again as by way of a buffer
                out[part].copy_(self.codes[part]).mul_(scale_O1[part])
            else:
                out[part] = self.codes[part].float().mul_(scale_O1[part])
        if self.columns is not None:
            assert self.outliers is not None
            out[:, self.columns] = self.outliers
        return out
