"""Losses, metrics and counts of a step, summed over its micro-batches where they are, and read once at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lowrank.batches import Totals
from lowrank.kernels.accelerators import wide
from lowrank.objectives import Metrics


def add_shares(metrics: Metrics, extra: Metrics) -> None:
    """Shares of one micro-batch, added where they are: nothing waits for the device."""
    for name, value in extra.items():
        metrics[name] = metrics[name] + value if name in metrics else value


def add_totals(totals: Totals, more: Totals) -> None:
    """What the losses of a step are divided by, counted on the host."""
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value


def read_together(metrics: Mapping[int, Metrics]) -> dict[int, dict[str, float]]:
    """The numbers of all jobs, by slot, for which the host waits once."""
    tensors = [value.detach() for own in metrics.values() for value in own.values() if isinstance(value, torch.Tensor)]
    read = iter(numbers(tensors))
    return {
        slot: {name: next(read) if isinstance(value, torch.Tensor) else float(value) for name, value in own.items()}
        for slot, own in metrics.items()
    }


def numbers(scalars: Sequence[torch.Tensor]) -> list[float]:
    """Tensors of one element each, for which the host waits once."""
    if not scalars:
        return []
    return torch.stack([wide(each) for each in scalars]).tolist()
