"""FP4: 16 levels of a 4-bit float (sign, two bits of exponent, one of mantissa). Prefer nf4, which rounds less."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lowrank.models.storages.four_bit import FourBitLinear, four_bit_bytes, four_bit_of
from lowrank.models.storages.packed import QuantizedStorage


class FP4Config(QuantizedStorage):
    """4-bit floats: a third more rounding error than nf4 on normal weights."""

    type: Literal["fp4"] = "fp4"
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share a scale. Smaller: nearer to the original, more bytes."""
    double_quant: bool = True
    """Keep the scales in 8 bits too: saves 0.373 bits per weight at block_size 64, and changes next to nothing."""

    def wrap(self, linear: nn.Module) -> FourBitLinear:
        """The layer in 4 bits, on the device its weight is on."""
        return four_bit_of(linear, "fp4", self.block_size, self.double_quant)

    def bytes_of(self, shape: tuple[int, int], itemsize: int = 2) -> int:
        """What it keeps of a weight of (O, D): the same in every compute dtype."""
        del itemsize
        return four_bit_bytes(shape[0] * shape[1], self.block_size, self.double_quant)
