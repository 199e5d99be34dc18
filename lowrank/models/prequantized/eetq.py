"""EETQ checkpoints: 8-bit weights, one scale a row, in the order that its kernels for Turing and later GPUs read.

Of a linear (D in, O out): weight or qweight (D, O) int8, weight_scales (O). w = code * scale, code in -128..127.

The order is that of FasterTransformer's `preprocess_weights_for_mixed_gemm` (EETQ's csrc/cutlass_kernels): of each 16
inputs the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15; then by output; then, of two neighboring outputs, 64 inputs by
turns; then 128 added, and of each four the second and third exchanged. Files made on a Volta GPU have another order
and do not say so; EETQ there is a rarity, and a model so read says nothing but noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.errors import ModelError
from lowrank.models.prequantized.checks import FLOATS, WAY_OUT, one_of, take
from lowrank.models.storages.affine import AffineLinear

METHODS = ("eetq",)
TILE, COLUMNS, ROWS = 64, 2, 16
"""Inputs of one output in a row; outputs by turns; inputs that are exchanged among themselves."""


def reader(quantization_config: Mapping[str, Any]) -> EetqReader:
    """Raises ModelError for all but int8, EETQ's one kind."""
    one_of(quantization_config, "weights", ("int8",), "int8")
    return EetqReader()


@dataclass(frozen=True)
class EetqReader:
    """See the module."""

    suffixes: tuple[str, ...] = ("weight", "qweight", "weight_scales")
    notice: str | None = None

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> AffineLinear:
        """The linear, a byte a weight."""
        stored_DO = take(name, tensors, "qweight" if "qweight" in tensors else "weight", (torch.int8,), (None, None))
        columns, rows = stored_DO.shape
        if columns % TILE or rows % TILE:
            raise ModelError(
                f"{name}.weight: a layer of {columns} inputs and {rows} outputs, which EETQ's order does not have: it "
                f"goes by {TILE}. {WAY_OUT}"
            )
        scale_O = take(name, tensors, "weight_scales", FLOATS, (rows,))
        zero_11 = torch.full((1, 1), 128, dtype=torch.int16)
        return AffineLinear(in_order(stored_DO), 8, scale_O[:, None], zero_11, columns, bias, dtype)


def in_order(stored_DO: torch.Tensor) -> torch.Tensor:
    """Codes plus 128, (O, D) uint8, of a weight in the kernels' order."""
    columns, rows = stored_DO.shape
    return undone(stored_DO.contiguous().view(torch.uint8), columns, rows)


def undone(stored: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """The order alone: (O, D) of D x O values of any dtype."""
    by_fours = stored.reshape(-1, 4)[:, [0, 2, 1, 3]]
    turns = by_fours.reshape(rows // COLUMNS, columns // TILE, COLUMNS, TILE)
    by_output_OD = turns.transpose(1, 2).reshape(rows, columns)
    place = torch.arange(ROWS)
    source = 8 * ((place % 4) // 2) + place % 2 + 2 * (place // 4)
    groups = by_output_OD.reshape(rows, columns // ROWS, ROWS)
    return groups[:, :, source.argsort()].reshape(rows, columns)
