"""Two-stage activation checkpointing: of every k layers in a row, only the input of the first is kept.

Training deep nets with sublinear memory (Chen et al., arXiv:1604.06174) computes such a segment again as
a whole, so the activations of k layers are alive together; with transformers' layers, whose input is small against
what they save, that needs more than keeping every input. So here the inputs are made again first, and
then each layer by itself: sqrt(n) + sqrt(n) inputs and the activations of one layer are alive. The price
is up to two extra forward passes instead of one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


class Segments:
    """Cuts the layers of each forward pass into segments of `length`, as long as one's output is the next's input."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._open: _Segment | None = None

    def runs(self, num_layers: int) -> list[Any]:
        """For each layer in order: `run(function, *args)`."""
        return [partial(self._run, first=index % self._length == 0) for index in range(num_layers)]

    def _run(self, function: Callable[..., Any], hidden: torch.Tensor, *rest: Any, first: bool) -> Any:
        if first or self._open is None or not self._open.goes_on_with(hidden):
            self._open = _Segment(hidden)
        segment = self._open
        result = segment.run(partial(_call, function, rest), hidden)
        if segment.is_full(self._length):
            self._open = None
        return result


def _call(function: Callable[..., Any], rest: tuple[Any, ...], hidden: torch.Tensor) -> Any:
    return function(hidden, *rest)


def _hidden_of(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


class _Segment:
    """The layers of one segment in one forward pass. Autograd's graph holds it, so it must not hold the graph."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self._layers: list[Callable[[torch.Tensor], Any]] = []
        self._inputs: dict[int, torch.Tensor] = {0: hidden.detach()}
        self._needs_grad: list[bool] = []
        self._last = weakref.ref(hidden)

    def goes_on_with(self, hidden: torch.Tensor) -> bool:
        return self._last() is hidden

    def is_full(self, length: int) -> bool:
        return len(self._layers) == length

    def run(self, layer: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
        saved = _Saved(self, len(self._layers))
        self._layers.append(layer)
        self._needs_grad.append(hidden.requires_grad)
        with saved_tensors_hooks(saved.forget, saved.make_again):
            result = layer(hidden)
        self._last = weakref.ref(_hidden_of(result))
        return result

    def saved_by(self, index: int) -> list[torch.Tensor]:
        """What layer `index` saves, computed again."""
        if index not in self._inputs:
            self._make_inputs(index)
        hidden = self._inputs[index] if index == 0 else self._inputs.pop(index)
        found: list[torch.Tensor] = []
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: found.append(tensor.detach()), _never):
            self._layers[index](hidden.detach().requires_grad_(self._needs_grad[index]))
        return found

    def _make_inputs(self, last: int) -> None:
        """Inputs of the layers up to `last`. With gradients on, so that the same kernels run as the first time."""
        for index in range(last):
            hidden = self._inputs[index].detach().requires_grad_(self._needs_grad[index])
            with torch.enable_grad(), saved_tensors_hooks(_drop, _never):
                self._inputs[index + 1] = _hidden_of(self._layers[index](hidden)).detach()


class _Saved:
    """The saved tensors of one layer: forgotten in order, and found again by their number."""

    def __init__(self, segment: _Segment, index: int) -> None:
        self._segment = segment
        self._index = index
        self._count = 0
        self._found: list[torch.Tensor] | None = None

    def forget(self, tensor: torch.Tensor) -> int:
        del tensor
        self._count += 1
        return self._count - 1

    def make_again(self, number: int) -> torch.Tensor:
        if self._found is None:
            self._found = self._segment.saved_by(self._index)
            assert len(self._found) == self._count, "a layer saved other tensors the second time"
        return self._found[number]


def _drop(tensor: torch.Tensor) -> None:
    del tensor


def _never(packed: Any) -> torch.Tensor:
    raise AssertionError("the graph of a recomputation has no backward pass")
