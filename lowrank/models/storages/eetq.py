"""EETQ's arithmetic: every row of a weight in 8 bits, -128 to 127, in steps of 1/128 of its largest value.

As `int8` but for the step (1/127 there) and the scale, which EETQ keeps in float16. Its kernels for GPUs are not used:
arithmetic stays in the run's dtype, on any device.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from lowrank.kernels.bit_packing import packed_bytes
from lowrank.models.storages.affine import AffineLinear
from lowrank.models.storages.packed import QuantizedStorage, bias_of, weight_of


class EetqConfig(QuantizedStorage):
    """8 bits per weight, one scale per row (output), symmetric, as EETQ quantizes; a byte a weight in memory."""

    type: Literal["eetq"] = "eetq"

    def wrap(self, linear: nn.Module) -> AffineLinear:
        """The layer in 8 bits, on the device its weight is on."""
        weight_OD = weight_of(linear)
        code_OD, scale_O1 = quantize(weight_OD)
        zero_11 = torch.full((1, 1), 128, dtype=torch.int16, device=weight_OD.device)
        dtype, columns = weight_OD.dtype, weight_OD.shape[1]
        return AffineLinear(code_OD, 8, scale_O1, zero_11, columns, bias_of(linear), dtype)

    def bytes_of(self, shape: tuple[int, int], itemsize: int = 2) -> int:
        """What it keeps of a weight of (O, D): codes, a scale for each row, and the one zero point."""
        del itemsize
        return shape[0] * (packed_bytes(shape[1], 8) + 2) + 2


def quantize(weight_OD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes plus 128 (O, D) uint8, float16 scales (O, 1)), as EETQ's `symmetric_quantize`: codes by the scale before
    it is rounded, halves away from zero."""
    scale_O1 = weight_OD.abs().amax(dim=1, keepdim=True).float() / 128.0
    step_O1 = scale_O1.clamp(min=torch.finfo(torch.float32).tiny)
    code_OD = torch.empty(weight_OD.shape, dtype=torch.uint8, device=weight_OD.device)
    rows = max(1, (1 << 20) // weight_OD.shape[1])
    for first in range(0, len(weight_OD), rows):
        part = weight_OD[first : first + rows].float() / step_O1[first : first + rows]
        whole = torch.trunc(part + torch.copysign(torch.full_like(part, 0.5), part))
        code_OD[first : first + rows] = (whole.clamp_(-128, 127) + 128).to(torch.uint8)
    return code_OD, scale_O1.half()
