"""AWQ: how much each input channel is enlarged before its weights are rounded, so that channels that carry much are
rounded finely.

Lin et al. 2023 (arXiv:2306.00978), equations 4 and 5: W x = (W diag(s)) (diag(1/s) x) with s = magnitude^a, and the
a in [0, 1) that leaves the least error of the rounded product. Whoever makes x divides it by s. The paper rounds to the
nearest; here the rounding is the caller's, so that the a is right for weights that make up for each other's too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

EXPONENTS = tuple(step / 10 for step in range(10))
_MOST_ROWS = 256
"""Of the weights, so many rows are looked at, spread evenly."""
_LEAST = 1e-4
"""Of the mean magnitude: channels that are always zero would get scales without bound."""

Rounded = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(weight (O, D), mean of x x^T (D, D))` -> the weight as it comes back."""


def channel_scales(
    weight_OD: torch.Tensor, moment_DD: torch.Tensor, row_D: torch.Tensor, rows: int, rounded: Rounded
) -> torch.Tensor:
    """The scales s (`rows`), at `row_D[d]` that of input d: what makes the inputs may feed several with one row.

    `weight_OD`: all weights that see these inputs, one below the other. `moment_DD`: mean of x x^T. Magnitudes are
    root mean squares, where the paper takes mean absolute values.
    """
    weight_OD, moment_DD = _spread(weight_OD.float()), moment_DD.float()
    zeros_R = torch.zeros(rows, device=moment_DD.device)
    square_R = zeros_R.index_add(0, row_D, moment_DD.diagonal())
    count_R = zeros_R.index_add(0, row_D, torch.ones_like(moment_DD.diagonal()))
    magnitude_R = (square_R / count_R.clamp(min=1)).sqrt()
    magnitude_R = magnitude_R.clamp(min=float(_LEAST * magnitude_R.mean().clamp(min=1e-12)))
    best_R, least = torch.ones_like(magnitude_R), float("inf")
    for exponent in EXPONENTS:
        scale_R = magnitude_R**exponent
        scale_R = scale_R / (scale_R.max() * scale_R.min()).sqrt()
        scale_D = scale_R[row_D]
        value_OD = rounded(weight_OD * scale_D, moment_DD / (scale_D[:, None] * scale_D))
        error_OD = value_OD / scale_D - weight_OD
        error = float(((error_OD @ moment_DD) * error_OD).sum())
        if error < least:
            best_R, least = scale_R, error
    return best_R


def _spread(weight_OD: torch.Tensor) -> torch.Tensor:
    if len(weight_OD) <= _MOST_ROWS:
        return weight_OD
    return weight_OD[torch.linspace(0, len(weight_OD) - 1, _MOST_ROWS).round().long()]
