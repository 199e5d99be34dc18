"""Additive quantization (AQLM, Egiazarian et al. 2024, arXiv:2401.06118): groups of weights looked up in codebooks."""

from __future__ import annotations

import torch

from lowrank.kernels.scratch import scratch
from lowrank.models.storages.packed import PackedLinear

_CPU_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 24


class AdditiveLinear(PackedLinear):
    """A tile of the matrix (mostly 1 x 8) is the sum of one vector of each codebook, times the scale of its rows."""

    codes: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        code_PQK: torch.Tensor,
        codebook_KCHW: torch.Tensor,
        scale_P: torch.Tensor,
        bias_O: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """Signed integer codes of tile (P, Q) in codebook K, of C entries of H x W weights."""
        height, width = codebook_KCHW.shape[2:]
        super().__init__(code_PQK.shape[1] * width, code_PQK.shape[0] * height, bias_O, dtype)
        self.register_buffer("codes", code_PQK.contiguous())
        self.register_buffer("codebooks", codebook_KCHW.contiguous())
        self.register_buffer("scales", scale_P.contiguous())

    def dense_weight(self) -> torch.Tensor:
        """W as (O, D), in scratch memory. Summed and scaled in float32, rounded once."""
        out_OD = scratch((self.out_features, self.in_features), self.dtype, self.codes.device)
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        entries, height = self.codebooks.shape[1:3]
        size = _CPU_BLOCK if out_OD.device.type == "cpu" else _GPU_BLOCK
        step = max(1, size // (self.in_features * height))
        for first in range(0, self.codes.shape[0], step):
            rows = slice(first, first + step)
            index_KPQ = (self.codes[rows].long() % entries).movedim(2, 0)  # negative numbers are the upper half
            tile_PQHW = self.codebooks[0][index_KPQ[0]].to(work)
            for codebook_CHW, index_PQ in zip(self.codebooks[1:], index_KPQ[1:]):
                tile_PQHW += codebook_CHW[index_PQ]
            tile_PQHW *= self.scales[rows, None, None, None].to(work)
            weight_PHQW = tile_PQHW.transpose(1, 2)
            out_OD[first * height : (first + weight_PHQW.shape[0]) * height].view(weight_PHQW.shape).copy_(weight_PHQW)
        return out_OD
