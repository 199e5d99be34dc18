"""Tensors in safetensors files. Nothing here or elsewhere in lowrank reads or writes a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowrank.errors import LowrankError, ModelError
from lowrank.foreign_files import check_file


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors`, as `dtype` if given. They may be anywhere, of any strides, and share memory. `metadata`: more of
    the file's header."""
    save_file(
        {name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt", **(metadata or {})},
    )


def read_tensors(path: Path, error: type[LowrankError] = ModelError) -> dict[str, torch.Tensor]:
    """The tensors of a file, on the CPU, in memory of their own. Raises `error` if it is not whole."""
    check_file(path, error)
    try:
        with safe_open(path, framework="pt") as file:  # maps the file, which must not be held open behind our back
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as problem:
        raise error(f"{path}: cannot be read as safetensors ({problem}); it is damaged or something else") from problem


def read_shapes(path: Path, error: type[LowrankError] = ModelError) -> dict[str, torch.Tensor]:
    """The tensors of a file without their values: shapes and dtypes, on the device `meta`. Only the header is read.
    Raises `error` if it is not whole."""
    check_file(path, error)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: torch.empty(each.get_shape(), dtype=_DTYPES.get(each.get_dtype(), torch.uint8), device="meta")
                for name, each in slices.items()
            }
    except (SafetensorError, OSError) as problem:
        raise error(f"{path}: cannot be read as safetensors ({problem}); it is damaged or something else") from problem


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names. What is none of an adapter's (8-bit floats and their kind) has the width of a byte here."""
