"""EETQ: 8-bit weights in an order made for one vendor's GPU kernels. Not read; this says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank.errors import ModelError

METHODS = ("eetq",)


def reader(quantization_config: Mapping[str, Any]) -> Any:
    """Raises ModelError: the package is on no index, and its weights are interleaved for its own CUDA kernels."""
    del quantization_config
    raise ModelError(
        "this checkpoint was quantised with EETQ: its weights are interleaved for CUDA kernels of the package `eetq`, "
        "which PyPI does not have, so lowrank cannot read it. Take the model's 16-bit checkpoint with "
        "model.storage: int8, which keeps the same 8 bits per weight and trains on CPU and on any GPU"
    )
