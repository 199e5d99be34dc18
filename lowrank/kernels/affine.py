"""Groups of small integers to weights: w = (code - zero) * scale."""

from __future__ import annotations

import torch

from lowrank.kernels.bit_packing import MULTIPLE, unpack
from lowrank.kernels.scratch import scratch

_CPU_BLOCK = 1 << 16
_GPU_BLOCK = 1 << 24
"""Codes unpacked at once: what is between codes and weights stays in a CPU's cache, or small on a GPU."""


def dequantize(
    packed_OB: torch.Tensor,
    bits: int,
    scale_OG: torch.Tensor,
    zero_OG: torch.Tensor,
    group_size: int,
    out_OD: torch.Tensor,
    group_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the weights into `out_OD` and return it. Computed in float32 (float64 if `out_OD` is), rounded once.

    packed_OB: `bit_packing.pack` of codes (O, D). scale_OG, zero_OG: any float or integer dtype, zero_OG also (1, 1).
    Group g covers columns [g * group_size, (g + 1) * group_size), the last one what is left; or those where
    group_D (D,) is g.
    """
    rows, columns = out_OD.shape
    padded = -(-columns // MULTIPLE) * MULTIPLE
    block = max(1, (_CPU_BLOCK if out_OD.device.type == "cpu" else _GPU_BLOCK) // padded)
    work = torch.float64 if out_OD.dtype == torch.float64 else torch.float32
    code_NC = scratch((min(block, rows), padded), torch.uint8, out_OD.device)
    weight_ND = torch.empty(min(block, rows), columns, dtype=work, device=out_OD.device)
    whole = columns // group_size * group_size
    for first in range(0, rows, block):
        block_rows = slice(first, min(first + block, rows))
        count = block_rows.stop - first
        code_ND = unpack(packed_OB[block_rows], bits, code_NC[:count])[:, :columns]
        w_ND = weight_ND[:count]
        w_ND.copy_(code_ND)
        scale_NG = scale_OG[block_rows].to(work)
        zero_NG = (zero_OG if zero_OG.shape[0] == 1 else zero_OG[block_rows]).to(work).expand_as(scale_NG)
        if group_D is not None:
            w_ND.sub_(zero_NG[:, group_D]).mul_(scale_NG[:, group_D])
        else:
            full = whole // group_size
            if full:
                w_NGS = w_ND[:, :whole].unflatten(1, (full, group_size))
                w_NGS.sub_(zero_NG[:, :full, None]).mul_(scale_NG[:, :full, None])
            if whole < columns:
                w_ND[:, whole:].sub_(zero_NG[:, full:]).mul_(scale_NG[:, full:])
        out_OD[block_rows].copy_(w_ND)
    return out_OD
