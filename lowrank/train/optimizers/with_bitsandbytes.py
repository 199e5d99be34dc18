"""Optimizers of bitsandbytes: state in 8 bit, and state that moves to host memory when the GPU is full."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from lowrank.errors import ConfigError

_SMALLEST = 4096
"""Parameters with fewer numbers keep their state in 32 bit."""
_BLOCK = 256
"""Block size: how many numbers share a scale."""


def optimizer_of_bitsandbytes(name: str, groups: Any, **options: Any) -> torch.optim.Optimizer:
    """Return `bitsandbytes.optim.<name>`. ConfigError if the library is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            "optimizer.type: 8-bit and paged optimizers need bitsandbytes: pip install 'lowrank-llm[bnb]'; or use adamw"
        ) from error
    return getattr(bitsandbytes.optim, name)(groups, **options)


def bytes_in_8_bit(parameters: Iterable[torch.Tensor], moments: int) -> int:
    """Return the bytes of these parameters' 8-bit state: a byte for each moment, a float32 scale for each block, and
    one codebook per moment; small parameters in 32 bit."""
    total, codebooks = 0, 0
    for parameter in parameters:
        number = parameter.numel()
        if number < _SMALLEST:
            total += moments * 4 * number
        else:
            total += moments * (number + 4 * math.ceil(number / _BLOCK))
            codebooks = moments * 256 * 4
    return total + codebooks


def unpaged(name: str, device: torch.device) -> list[str]:
    """Return the notice about a paged optimizer on a device where nothing can be paged."""
    if device.type == "cuda":
        return []
    return [f"optimizer.type {name}: only a GPU's memory can be paged; on {device.type} the state stays where it is"]
