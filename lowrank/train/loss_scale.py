"""Loss scaling for float16: gradients below 6e-8 would be 0, so losses are multiplied before the backward pass.

As torch's `GradScaler` does it (it scales one loss for all; here every job has its own, so that a job whose gradients
overflow leaves the others alone): halved when a gradient overflows, doubled after many steps without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FIRST = 65536.0
LARGEST = 2.0**24
STEPS_TO_GROW = 2000


@dataclass
class LossScale:
    """One job's scale, a power of two."""

    value: float = FIRST
    good_steps: int = 0
    """In a row."""

    def grow(self) -> None:
        """A step went well."""
        self.good_steps += 1
        if self.good_steps >= STEPS_TO_GROW:
            self.value, self.good_steps = min(2.0 * self.value, LARGEST), 0

    def shrink(self) -> bool:
        """A gradient overflowed; False if the scale is not to blame, being 1 already."""
        self.good_steps = 0
        if self.value <= 1.0:
            return False
        self.value = max(1.0, 0.5 * self.value)
        return True


def scale_for(dtype: torch.dtype) -> LossScale | None:
    """A fresh one where gradients in `dtype` would underflow; bfloat16 reaches as far down as float32."""
    return LossScale() if dtype == torch.float16 else None
