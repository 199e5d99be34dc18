"""What is computed, kept and trained in more digits than the base has."""

from __future__ import annotations

import torch


def float32_or_wider(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16 bits and less, float64 for itself: of masters, statistics, log-probabilities, merged weights."""
    return torch.promote_types(dtype, torch.float32)
