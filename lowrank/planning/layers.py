"""Which decoder layers of a model are alike, so that a few stand for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lowrank.models.layers import decoder_layers

_OWN_NUMBER = ("number", "layer_idx", "layer_index", "layer_number", "block_idx", "layer_id")


def kinds_of_layers(model: Any) -> list[int]:
    """For each decoder layer the number of the first layer that is like it: [0, 1, 0, 1] if two kinds take turns.

    Alike: the same classes, shapes and plain attributes all the way down. Empty where no stack of layers is found.
    """
    stack = decoder_layers(model)
    if stack is None:
        return []
    looks = [_look(layer) for layer in stack]
    return [looks.index(look) for look in looks]


def keep_layers(model: Any, keep: Sequence[int]) -> None:
    """Take the other decoder layers out of the model."""
    stack = decoder_layers(model)
    assert stack is not None
    chosen = [stack[index] for index in keep]
    del stack[:]
    stack.extend(chosen)


def _look(layer: nn.Module) -> str:
    parts = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, bool)) and key not in _OWN_NUMBER
        }
        shapes = [(key, tuple(value.shape)) for key, value in module.named_parameters(recurse=False)]
        parts.append((name, type(module).__name__, sorted(plain.items()), shapes))
    return repr(parts)
