"""Layerwise updates: each parameter is updated within the backward pass, as soon as its gradient is complete.

The gradient is then freed, so the gradients of a whole model never exist at once (LOMO, arXiv:2306.09782; the per-layer
updates of GaLore's authors). Any optimizer that updates parameters independently may be used so, with the same bits.
When a parameter is updated, the backward pass needs its old value no more: torch calls the hook after all of the
gradient is accumulated.

The norm of the whole gradient is known only after all updates, so gradients cannot be clipped by it. A loss that is not
finite updates nothing; a gradient that is not finite leaves its own parameter unchanged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping

import torch
from torch import nn


class LayerwiseUpdates:
    """Updates a full-parameter job in the backward pass of a step's last micro-batch; earlier ones accumulate
    gradients."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        masters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        write_back: Callable[[str], None],
    ) -> None:
        """`weights` receive gradients, which hooks move to their `masters` (a float32 weight is its own master);
        `write_back` copies a master to its weight."""
        self._masters = masters
        self._optimizer = optimizer
        self._write_back = write_back
        self._updates = False
        self._earlier: dict[str, torch.Tensor] = {}
        self.square = 0.0
        """Sum of the squares of all gradients that were used since `begin`."""
        self.finite = True
        """Whether all gradients since `begin` were finite."""
        self.updated = False
        """Whether any parameter was updated since `begin`."""
        self._handles = [  # after the masters' own
            weight.register_post_accumulate_grad_hook(self._hook(name)) for name, weight in weights.items()
        ]

    def close(self) -> None:
        """Remove the hooks from the weights."""
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """Begin an optimizer step."""
        self.square, self.finite, self.updated = 0.0, True, False

    @contextlib.contextmanager
    def updating(self) -> Generator[None, None, None]:
        """Context for the backward pass of the step's last micro-batch, in which parameters are updated. Gradients of
        earlier micro-batches that get no further ones in it remain for `optimizer.step`."""
        self._earlier = {name: each.grad for name, each in self._masters.items() if each.grad is not None}
        for name in self._earlier:  # so that the optimizer sees one parameter at a time
            self._masters[name].grad = None
        self._updates = True
        try:
            yield
        finally:
            self._updates = False
            for name, gradient in self._earlier.items():
                self._masters[name].grad = gradient
            self._earlier = {}

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def update(weight: torch.Tensor) -> None:
            del weight
            master = self._masters[name]
            if not self._updates or master.grad is None:
                return
            earlier = self._earlier.pop(name, None)
            if earlier is not None:
                master.grad = earlier.add_(master.grad)
            norm = float(torch.linalg.vector_norm(master.grad))
            if math.isfinite(norm):
                self.square += norm**2
                self.updated = True
                self._optimizer.step()  # no other parameter has a gradient
                self._write_back(name)
            else:
                self.finite = False
            master.grad = None

        return update
