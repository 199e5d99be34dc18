"""Rematerialization: tensors that say how to compute them again from others that are kept anyway.

A frozen layer keeps its input for the gradient of its adapter. Where the input is a cheap function of tensors that the
graph keeps in any case, the layer keeps those instead, and the input itself is free as soon as it has been read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rematerialization:
    """`make(*parts)` has the bits of the tensor that carries this."""

    make: Callable[..., torch.Tensor]
    parts: tuple[torch.Tensor, ...]


def rematerialize_with(x: torch.Tensor, make: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
    """`x`, with how to make it again. Whoever changes `x` in place makes its recipe wrong."""
    x.recipe = Rematerialization(make, tuple(part.detach() for part in parts))  # type: ignore[attr-defined]
    return x


def rematerialization_of(x: torch.Tensor) -> Rematerialization:
    """How to make `x` again; where nobody said, from itself."""
    return getattr(x, "recipe", None) or Rematerialization(_itself, (x,))


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x
