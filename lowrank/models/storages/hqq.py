"""HQQ: 8, 6, 5, 4, 3, 2 or 1 bits, found without data in seconds a layer. 5 and 6 bits are packed as tight as 4.

See `lowrank.quantization.half_quadratic`. A group costs 32 bits more, for its scale and its zero point: 4 bits in
groups of 64 are 4.5 bits a weight.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from lowrank.kernels.bit_packing import packed_bytes
from lowrank.models.storages.affine import AffineLinear
from lowrank.models.storages.packed import QuantizedStorage, bias_of, weight_of
from lowrank.quantization.half_quadratic import half_quadratic
from lowrank.settings import Positive


class HQQConfig(QuantizedStorage):
    """Half-quadratic quantization."""

    type: Literal["hqq"] = "hqq"
    bits: Literal[8, 6, 5, 4, 3, 2, 1] = 4
    """Bits for each weight, without scale and zero point."""
    group_size: Positive | None = 64
    """How many weights of a row share a scale and a zero point. null: the whole row."""
    fit_scale: bool = True
    """Fit the scale of a group too. false: the method as published, less exact, most of all at 1 to 3 bits."""
    iterations: int = Field(20, ge=1)
    """At most so many rounds; it stops when no group gets better."""

    def wrap(self, linear: nn.Module) -> AffineLinear:
        """The layer in few bits, on the device its weight is on."""
        weight_OD = weight_of(linear)
        groups = half_quadratic(
            weight_OD, self.bits, self.group_size, fit_scale=self.fit_scale, iterations=self.iterations
        )
        return AffineLinear(
            groups.code_OD,
            self.bits,
            groups.scale_OG,
            groups.zero_OG,
            groups.group_size,
            bias_of(linear),
            weight_OD.dtype,
        )

    def bytes_of(self, shape: tuple[int, int], itemsize: int = 2) -> int:
        """What it keeps of a weight of (O, D): codes, and for each group a scale and a zero point in 16 bit."""
        del itemsize
        groups = -(-shape[1] // min(self.group_size or shape[1], shape[1]))
        return shape[0] * (packed_bytes(shape[1], self.bits) + 4 * groups)
