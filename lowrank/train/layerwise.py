"""Updates within the backward pass: a parameter is updated as soon as its gradient is there, and the gradient goes.

So the gradients of a whole model are never there at once (LOMO, arXiv:2306.09782; the per-layer updates of GaLore's
authors). Any optimizer that looks at one parameter at a time may be used so, and gives the same bits. By the time a
parameter is updated nothing in the backward pass needs its old value any more: torch adds up all of a gradient before
it says that it is there.

The norm of the whole gradient is known when everything is updated, so nothing can be clipped by it. A loss that is not
finite updates nothing; a gradient that is not finite leaves its own parameter as it was.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping

import torch
from torch import nn


class LayerwiseUpdates:
    """What a full-parameter job's backward passes update. The last pass of a step does; earlier ones add up."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        masters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        write_back: Callable[[str], None],
    ) -> None:
        """`weights` receive gradients, which by then are their masters' (or they are their own); `write_back` brings
        a weight up to date with its master."""
        self._masters = masters
        self._optimizer = optimizer
        self._write_back = write_back
        self._updates = False
        self._earlier: dict[str, torch.Tensor] = {}
        self.square = 0.0
        """Of the norm of what was updated since `begin`."""
        self.finite = True
        """No gradient since `begin` had to be left out."""
        self.updated = False
        """Something was updated since `begin`."""
        self._handles = [  # after the masters' own
            weight.register_post_accumulate_grad_hook(self._when_there(name)) for name, weight in weights.items()
        ]

    def close(self) -> None:
        """Let go of the weights."""
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """A step."""
        self.square, self.finite, self.updated = 0.0, True, False

    @contextlib.contextmanager
    def updating(self) -> Generator[None, None, None]:
        """During the backward pass of the step's last forward pass. What no gradient came for in it keeps what it has
        from earlier ones."""
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

    def _when_there(self, name: str) -> Callable[[torch.Tensor], None]:
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
