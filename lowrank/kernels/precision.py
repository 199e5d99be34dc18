"""What is computed, kept and trained in more digits than the base has."""

from __future__ import annotations

import torch


def float32_or_wider(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16 bits and less, float64 for itself: of masters, statistics, log-probabilities, merged weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32  # promote_types is an operator, which modes see
