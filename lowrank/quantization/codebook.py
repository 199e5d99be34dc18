"""Unevenly spaced levels: NF4 and FP4, each block of weights divided by its largest.

NF4: the 16 quantiles of a normal distribution, zero among them (Dettmers et al. 2023, QLoRA, appendix E).
FP4: sign, 2 bits of exponent, 1 of mantissa, as bitsandbytes orders and scales them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_OFFSET = 0.9677083
"""The mean of 1 - 1/30 and 1 - 1/32: where the outermost quantiles lie (bitsandbytes' value)."""


def nf4_levels() -> torch.Tensor:
    """(16,) float32, ascending, -1 to 1."""
    positive = _normal_quantiles(torch.linspace(_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -_normal_quantiles(torch.linspace(_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    return (levels / levels.max()).float()


def fp4_levels() -> torch.Tensor:
    """(16,) float32 by code: bit 3 is the sign. Code 8 is a second zero."""
    magnitude = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12
    return torch.cat([magnitude, -magnitude]).float()


def _normal_quantiles(probability: torch.Tensor) -> torch.Tensor:
    return math.sqrt(2) * torch.erfinv(2 * probability - 1)


@dataclass(frozen=True)
class QuantizedBlocks:
    """w = levels[code] * absmax of the block. Blocks run over the flattened matrix, across rows."""

    code_N: torch.Tensor
    absmax_B: torch.Tensor
    levels: torch.Tensor
    block_size: int
    shape: tuple[int, ...]

    def weight(self) -> torch.Tensor:
        """float32, in the shape that came in."""
        absmax_N = self.absmax_B.repeat_interleave(self.block_size)[: self.code_N.numel()]
        return (self.levels[self.code_N.long()] * absmax_N).view(self.shape)


def by_codebook(
    weight: torch.Tensor, levels: torch.Tensor, block_size: int = 64, *, double_quantized: bool = False
) -> QuantizedBlocks:
    """The nearest level of every weight; halfway goes to the smaller level, zero to the first code that is zero."""
    flat_N = weight.detach().float().reshape(-1)
    padded_BS = torch.nn.functional.pad(flat_N, (0, -flat_N.numel() % block_size)).view(-1, block_size)
    absmax_B = padded_BS.abs().amax(dim=1)
    levels = levels.to(weight.device)
    order = levels.argsort(stable=True)
    ascending = levels[order]
    between = (ascending[1:] + ascending[:-1]) / 2
    share_BS = padded_BS / torch.where(absmax_B == 0, 1.0, absmax_B)[:, None]
    code_N = order[torch.bucketize(share_BS, between)].reshape(-1)[: flat_N.numel()]
    if double_quantized:
        absmax_B = _double_quantized(absmax_B)
    return QuantizedBlocks(code_N.to(torch.uint8), absmax_B, levels, block_size, tuple(weight.shape))


def _double_quantized(absmax_B: torch.Tensor, block_size: int = 256) -> torch.Tensor:
    """What is left of the scales after 8 bits each: less their mean, by blocks of 256, on the dynamic map."""
    mean = absmax_B.mean()
    return by_codebook(absmax_B - mean, dynamic_levels(), block_size).weight() + mean


def dynamic_levels() -> torch.Tensor:
    """(256,) ascending: the signed dynamic tree type of 8 bits (Dettmers 2015, arXiv:1511.04561).

    A sign, an exponent in unary (the number of zeros before the first one is a power of ten), and what is left as a
    linear fraction.
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, (1 << exponent) + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float64).float()
