"""What each way to quantize would cost a checkpoint: bits per parameter, error, and the layer that suffers most.

One weight at a time, so the model need not fit into memory; of large weights, rows spread evenly over the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lowrank.kernels.accelerators import wide
from lowrank.quantization.codebook import by_codebook, fp4_levels, nf4_levels
from lowrank.quantization.half_quadratic import half_quadratic
from lowrank.quantization.linear import asymmetric, symmetric

GROUP = 64
_DOUBLE = 8 / GROUP + 32 / (GROUP * 256)
"""Bits a weight that scales cost in 8 bits, with scales of their own for each 256 of them."""


@dataclass(frozen=True)
class Method:
    """One way to quantize."""

    name: str
    levels: str
    """even (linear) or uneven (non-linear)."""
    zero: str
    """symmetric or asymmetric around zero."""
    bits: int
    overhead: float
    """Bits a weight for scales and zero points."""
    quantize: Callable[[torch.Tensor], torch.Tensor]
    """(O, D) -> what comes back of it."""


def methods(group_size: int = GROUP) -> list[Method]:
    """Linear and non-linear, symmetric and asymmetric, 2 to 8 bits, NF4, FP4, HQQ; 16-bit scales."""
    scale = 16 / group_size
    found: list[Method] = []
    for bits in range(2, 9):
        found += [
            Method(
                f"int{bits} symmetric", "even", "symmetric", bits, scale,
                lambda w, bits=bits: symmetric(w, bits, group_size).weight(),
            ),
            Method(
                f"int{bits} asymmetric", "even", "asymmetric", bits, scale + bits / group_size,
                lambda w, bits=bits: asymmetric(w, bits, group_size).weight(),
            ),
        ]  # fmt: skip
        if bits != 7:
            found.append(
                Method(
                    f"hqq{bits}", "even", "asymmetric", bits, 2 * scale,
                    lambda w, bits=bits: half_quadratic(w, bits, group_size).weight(),
                )
            )  # fmt: skip
    nf4, fp4 = nf4_levels(), fp4_levels()
    found += [
        Method("nf4", "uneven", "asymmetric", 4, 32 / GROUP, lambda w: by_codebook(w, nf4).weight()),
        Method(
            "nf4 double", "uneven", "asymmetric", 4, _DOUBLE,
            lambda w: by_codebook(w, nf4, double_quantized=True).weight(),
        ),
        Method(
            "fp4 double", "uneven", "symmetric", 4, _DOUBLE,
            lambda w: by_codebook(w, fp4, double_quantized=True).weight(),
        ),
        Method("int8 per row", "even", "symmetric", 8, 0.0, lambda w: symmetric(w, 8).weight()),
    ]  # fmt: skip
    return sorted(found, key=lambda method: (method.bits, method.name))


@dataclass
class _Sum:
    squared_error: float = 0.0
    squared: float = 0.0
    stored_bits: float = 0.0
    worst: str = ""
    worst_error: float = -1.0


@dataclass
class QuantizationReport:
    """Fed one weight at a time; `rows()` at any moment."""

    group_size: int = GROUP
    most_weights: int = 1 << 20
    """Of a larger matrix, so many weights are looked at."""
    weights: int = 0
    looked_at: int = 0
    layers: int = 0
    _methods: list[Method] = field(init=False)
    _sums: list[_Sum] = field(init=False)

    def __post_init__(self) -> None:
        self._methods = methods(self.group_size)
        self._sums = [_Sum() for _ in self._methods]

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Measure every method on `weight` ((O, D), or (E, O, D) of experts)."""
        weight_OD = weight.detach().flatten(0, -2)
        sample_ND = weight_OD[_spread(len(weight_OD), weight_OD.shape[1], self.most_weights)].float()
        self.layers += 1
        self.weights += weight_OD.numel()
        self.looked_at += sample_ND.numel()
        share = weight_OD.numel() / max(1, sample_ND.numel())
        squared = float(wide(sample_ND).square().sum())
        for method, total in zip(self._methods, self._sums):
            error = float(wide(method.quantize(sample_ND) - sample_ND).square().sum())
            total.squared_error += error * share
            total.squared += squared * share
            per_row = 32 / weight_OD.shape[1] if method.overhead == 0 else 0.0
            total.stored_bits += (method.bits + method.overhead + per_row) * weight_OD.numel()
            relative = (error / squared) ** 0.5 if squared else 0.0
            if relative > total.worst_error:
                total.worst, total.worst_error = name, relative

    def rows(self) -> list[dict[str, Any]]:
        """One for each method, by bits per parameter."""
        found = [
            {
                "method": method.name,
                "levels": method.levels,
                "zero": method.zero,
                "bits": method.bits,
                "bits_per_parameter": total.stored_bits / max(1, self.weights),
                "mse": total.squared_error / max(1, self.weights),
                "relative_error": (total.squared_error / total.squared) ** 0.5 if total.squared else 0.0,
                "worst_layer": total.worst,
                "worst_relative_error": max(0.0, total.worst_error),
            }
            for method, total in zip(self._methods, self._sums)
        ]
        return sorted(found, key=lambda row: row["bits_per_parameter"])


def _spread(rows: int, columns: int, most_weights: int) -> torch.Tensor:
    count = min(rows, max(1, most_weights // columns))
    return torch.linspace(0, rows - 1, count).round().long()
