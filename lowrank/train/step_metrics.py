"""Losses, metrics and counts of a step: summed over its micro-batches on their device, and read once at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lowrank.batches import Totals
from lowrank.kernels.accelerators import wide
from lowrank.objectives import Metrics


def add_metrics(metrics: Metrics, extra: Metrics) -> None:
    """Add the metrics of one micro-batch in place, on their device: the host does not wait."""
    for name, value in extra.items():
        metrics[name] = metrics[name] + value if name in metrics else value


def add_totals(totals: Totals, more: Totals) -> None:
    """Add counts by which the losses of a step are divided, on the host, in place."""
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value


def read_metrics_to_host(metrics: Mapping[int, Metrics]) -> dict[int, dict[str, float]]:
    """Return all slots' metrics as floats. The host waits for the device once."""
    values = [value for of_slot in metrics.values() for value in of_slot.values()]
    tensors = [value.detach() for value in values if isinstance(value, torch.Tensor)]
    read = iter(read_scalars(tensors))
    return {
        slot: {name: next(read) if isinstance(value, torch.Tensor) else float(value) for name, value in of_slot.items()}
        for slot, of_slot in metrics.items()
    }


def read_scalars(scalars: Sequence[torch.Tensor]) -> list[float]:
    """Return the values of one-element tensors. The host waits for the device once."""
    if not scalars:
        return []
    return torch.stack([wide(each) for each in scalars]).tolist()
