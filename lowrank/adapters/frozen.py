"""The frozen bias of a layer, where it has one."""

from __future__ import annotations

import torch

from lowrank.models.storages import BaseLinear


def bias_of(base: BaseLinear) -> torch.Tensor | None:
    """The frozen bias."""
    return getattr(base, "bias", None)
