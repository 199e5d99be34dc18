"""Tensors in safetensors files. Nothing here or elsewhere in lowrank reads or writes a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowrank.errors import LowrankError, ModelError


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Write `tensors`, as `dtype` if given. They may be anywhere, of any strides, and share memory."""
    save_file(
        {name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def read_tensors(path: Path, error: type[LowrankError] = ModelError) -> dict[str, torch.Tensor]:
    """The tensors of a file, on the CPU, in memory of their own. Raises `error` if it is not whole."""
    try:
        with safe_open(path, framework="pt") as file:  # maps the file, which must not be held open behind our back
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as problem:
        raise error(f"{path}: cannot be read as safetensors ({problem}); it is damaged or something else") from problem
