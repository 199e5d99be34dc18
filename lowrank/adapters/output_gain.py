"""A gain on a layer's outputs, after their low-rank update (DoRA): y' = g (y - b) + b on the rows of each slot.

    forward     z  = y - b                      (P, O)
                y' = y + (g - 1) z              (P, O)     g - 1, which is zero at the start: y' has then the bits of y

    backward    d(g - 1) = sum over P of dy' z  (O)        in float32 or wider
                dy = dy' + (g - 1) dy'          (P, O)

It stands behind `LoraFunction` (lora_function.py), whose formulas it leaves as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.kernels.precision import float32_or_wider


@dataclass(frozen=True)
class Gain:
    """The gain of one slot on its rows of this call."""

    first: int
    end: int
    excess_O: torch.Tensor
    """g - 1 in the compute dtype."""


def apply_gains(
    y_TO: torch.Tensor, bias_O: torch.Tensor | None, gains: Sequence[Gain], masters: Sequence[torch.Tensor]
) -> torch.Tensor:
    """`y_TO`, changed in place, inside autograd. `masters`: the g - 1 that receive the gradients, one for each gain."""
    return OutputGainFunction.apply(y_TO, bias_O, tuple(gains), *masters)  # pyright: ignore[reportReturnType]


class OutputGainFunction(torch.autograd.Function):
    """The formulas above. `masters` are inputs only to receive gradients."""

    @staticmethod
    def forward(
        ctx: Any, y_TO: torch.Tensor, bias_O: torch.Tensor | None, gains: tuple[Gain, ...], *masters: torch.Tensor
    ) -> torch.Tensor:
        del masters
        plain: list[torch.Tensor] = []
        for gain in gains:
            y_PO = y_TO[gain.first : gain.end]
            plain.append(y_PO.clone() if bias_O is None else y_PO - bias_O)
            y_PO.addcmul_(plain[-1], gain.excess_O)
        ctx.gains = gains
        ctx.mark_dirty(y_TO)
        ctx.save_for_backward(*plain)  # z of each gain (P, O), which d(g - 1) is the product with
        return y_TO

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        dy_TO = outer[0].clone()  # rows of slots without a gain pass as they are
        gradients: list[torch.Tensor] = []
        for gain, plain_PO in zip(ctx.gains, ctx.saved_tensors):
            dy_PO = dy_TO[gain.first : gain.end]
            gradients.append((dy_PO * plain_PO).sum(0, dtype=float32_or_wider(dy_TO.dtype)))
            dy_PO.addcmul_(dy_PO.clone(), gain.excess_O)
        return dy_TO, None, None, *gradients
