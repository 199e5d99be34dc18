"""Taking a linear's tensors apart: what is missing or does not fit is an error that names the tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lowrank.errors import ModelError

WAY_OUT = (
    "Take the model's 16-bit checkpoint and let lowrank quantize it while it loads: model.storage: nf4 (or int8, hqq)"
)
INTEGERS = (torch.int32,)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def take(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    suffix: str,
    dtypes: Collection[torch.dtype],
    shape: tuple[int | None, ...] | None = None,
) -> torch.Tensor:
    """The tensor `name.suffix`, of one of `dtypes` and of `shape` (None: any size). Raises ModelError."""
    if suffix not in tensors:
        there = ", ".join(sorted(tensors)) or "nothing"
        raise ModelError(
            f"{name}.{suffix}: not in the checkpoint, which has {there} of this layer. Its download may be incomplete, "
            "or config.json's quantization_config is another checkpoint's"
        )
    tensor = tensors[suffix]
    if tensor.dtype not in dtypes:
        raise ModelError(f"{name}.{suffix}: its dtype is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if shape is not None and not fits(tensor.shape, shape):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ModelError(
            f"{name}.{suffix}: its shape is {tuple(tensor.shape)}, expected {wanted}; config.json's "
            "quantization_config (bits, group_size) does not describe this file"
        )
    return tensor


def fits(got: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    """Whether a shape is what was wanted; None is any size."""
    return len(got) == len(wanted) and all(want in (None, size) for size, want in zip(got, wanted))


def one_of(config: Mapping[str, Any], key: str, allowed: Collection[Any], default: Any) -> Any:
    """`quantization_config[key]`, which must be one of `allowed`. Raises ModelError."""
    value = config.get(key, default)
    if value not in allowed:
        raise ModelError(
            f"config.json: quantization_config.{key} is {value!r}; lowrank reads "
            f"{', '.join(repr(item) for item in allowed)} of {config.get('quant_method')}. {WAY_OUT}"
        )
    return value


def same_everywhere(zero_OG: torch.Tensor) -> torch.Tensor:
    """(1, 1) if all zero points are one value, as those of symmetric quantization are; else as it is."""
    return zero_OG[:1, :1] if bool((zero_OG == zero_OG[:1, :1]).all()) else zero_OG


def scattered(
    name: str, suffix: str, group_D: torch.Tensor | None, columns: int, groups: int, size: int
) -> torch.Tensor | None:
    """A group index, if it says more than that groups are neighbors; None if it does not. Raises ModelError."""
    if group_D is None:
        return None
    if not fits(group_D.shape, (columns,)):
        raise ModelError(f"{name}.{suffix}: its shape is {tuple(group_D.shape)}, expected ({columns},)")
    group_D = group_D.long()
    if bool((group_D < 0).all()):  # compressed-tensors fills it with -1 where there is no order
        return None
    if bool((group_D < 0).any()) or int(group_D.max()) >= groups:
        raise ModelError(f"{name}.{suffix}: it names groups outside 0 to {groups - 1}; the file is damaged")
    neighbors = torch.equal(group_D, torch.arange(columns, device=group_D.device) // size)
    return None if neighbors else group_D.to(torch.int32)
