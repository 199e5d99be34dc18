"""Calibration: the inputs that each layer gets while a job's own data goes through the bare base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.models.storages import BaseLinear


@dataclass(frozen=True)
class CalibrationBatch:
    """One forward pass over rows of a job's data."""

    learned_N: torch.Tensor
    """bool: which of the N rows that a linear layer sees are tokens that are learned."""
    run: Callable[[], None]
    """Does the pass, through the bare base, without gradients."""


CalibrationSteps = Callable[[], Iterable[tuple[CalibrationBatch, ...]]]
"""A job's optimizer steps from its beginning, each as its forward passes, without end."""

OnInput = Callable[[str, torch.Tensor], None]
"""`(layer, x (N, D))`, in the order of the model."""


class InputRecorder:
    """Hands on the inputs of some layers. Layers that come one after the other and get the same tensor (query, key and
    value) are one group: only the first of them is told of."""

    def __init__(self, layers: Mapping[str, BaseLinear], on_input: OnInput) -> None:
        self._layers = layers
        self._on_input = on_input
        self.leaders: dict[str, str] = {}
        """By layer: the first one with the same input, perhaps itself."""
        self._last: tuple[str, torch.Tensor] | None = None

    def record(self, run: Callable[[], None]) -> None:
        """Watch one pass."""
        handles = [self._hook(name, layer) for name, layer in self._layers.items()]
        try:
            run()
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, layer: Any) -> Any:
        def see(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            del module
            x = inputs[0].detach()
            x_ND = x.reshape(-1, x.shape[-1])
            # The last tensor is held, so its memory cannot have become another's.
            if self._last is None or not _is_same(self._last[1], x_ND):
                self._last = name, x_ND
                self._on_input(name, x_ND)
            self.leaders[name] = self._last[0]

        return layer.register_forward_pre_hook(see)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one._version == other._version
