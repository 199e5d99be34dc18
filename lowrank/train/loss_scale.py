"""Loss scaling for float16: gradients below 6e-8 would be 0, so losses are multiplied before the backward pass.

As in torch's `GradScaler` the scale is halved when a gradient overflows and doubled after many steps without. Every job
has its own scale, so that a job whose gradients overflow does not affect the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FIRST = 65536.0
LARGEST = 2.0**24
STEPS_TO_GROW = 2000


@dataclass
class LossScale:
    """The loss scale of one job, a power of two."""

    value: float = FIRST
    good_steps: int = 0
    """Steps in a row without overflow."""

    def grow(self) -> None:
        """Count a step without overflow; may double the scale."""
        self.good_steps += 1
        if self.good_steps >= STEPS_TO_GROW:
            self.value, self.good_steps = min(2.0 * self.value, LARGEST), 0

    def shrink(self) -> bool:
        """Halve the scale after an overflow. Returns False if it is 1 already, so that scaling is not the cause."""
        self.good_steps = 0
        if self.value <= 1.0:
            return False
        self.value = max(1.0, 0.5 * self.value)
        return True


def scale_for(dtype: torch.dtype) -> LossScale | None:
    """Return a new loss scale for float16; None for other dtypes, which do not underflow."""
    return LossScale() if dtype == torch.float16 else None
