"""bitsandbytes: nf4 and fp4 with and without double quantization, and LLM.int8, as transformers saves them.

Of a 4-bit linear: `weight` (uint8, two codes to a byte), `weight.absmax`, `weight.quant_map`, with double quantization
`weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4` (JSON as bytes: shape,
block sizes, offset). Of an 8-bit one: `weight` (int8), `SCB` (the largest value of each row), `weight_format`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lowrank.errors import ModelError
from lowrank.kernels.four_bit import BLOCK_SIZES, CODES, dynamic_map, packed_bytes
from lowrank.models.storages.four_bit import FourBitLinear
from lowrank.models.storages.int8 import Int8Linear

METHODS = ("bitsandbytes",)
_STATE = "weight.quant_state.bitsandbytes__"
_NESTED_DTYPE = "float32"


def reader(quantization_config: Mapping[str, Any]) -> BnbReader:
    """Raises ModelError for a configuration that asks for neither 4 nor 8 bits."""
    if not (quantization_config.get("load_in_4bit") or quantization_config.get("load_in_8bit")):
        raise ModelError(
            "config.json: quantization_config says bitsandbytes, but neither load_in_4bit nor load_in_8bit"
        )
    return BnbReader()


class BnbReader:
    """Builds our layers from bitsandbytes' tensors; bitsandbytes itself need not be installed."""

    suffixes = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
        *(_STATE + code for code in CODES), "SCB", "weight_format",
    )  # fmt: skip

    notice = None

    @property
    def as_stored(self) -> Mapping[str, str]:
        """See KeepsBytes."""
        return {"weight": "codes", "weight.absmax": "absmax", "SCB": "absmax"}

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """A 4- or 8-bit layer; ModelError names a tensor that is missing or does not fit."""
        if "SCB" in tensors:
            return _int8(name, tensors, bias, dtype)
        code = next((each for each in CODES if _STATE + each in tensors), None)
        if code is None:
            raise ModelError(f"{name}.{_STATE}nf4 (or fp4) is missing, so its shape and block size are unknown")
        return _four_bit(name, code, tensors, bias, dtype)


def _int8(name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype) -> Int8Linear:
    codes_OD, absmax_O = _have(name, tensors, "weight"), tensors["SCB"]
    if codes_OD.dtype != torch.int8 or codes_OD.ndim != 2 or absmax_O.numel() != len(codes_OD):
        raise ModelError(
            f"{name}.weight is {_shown(codes_OD)} and {name}.SCB {_shown(absmax_O)}; expected int8 (out, in) and one "
            "float32 for each row"
        )
    layout = tensors.get("weight_format")
    if layout is not None and layout.numel() == 1 and int(layout) != 0:
        raise ModelError(f"{name}.weight_format is {int(layout)}: only rows in order (0) can be read; save it again")
    return Int8Linear(codes_OD, absmax_O.float().view(-1), bias, dtype)


def _four_bit(
    name: str, code: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
) -> FourBitLinear:
    try:
        state = json.loads(bytes(tensors[_STATE + code].tolist()))
        shape, block_size = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{name}.{_STATE}{code} is not the JSON that bitsandbytes writes: {error}") from error
    weight, absmax = _have(name, tensors, "weight"), _have(name, tensors, "weight.absmax")
    if block_size not in BLOCK_SIZES or len(shape) != 2:
        raise ModelError(f"{name}.{_STATE}{code}: blocksize {block_size}, shape {shape}; not what bitsandbytes writes")
    values = tensors.get("weight.quant_map")
    if values is not None and not torch.allclose(values.float().view(-1), torch.tensor(CODES[code]), atol=1e-6):
        raise ModelError(f"{name}.weight.quant_map is not the {code} code")
    numel = shape[0] * shape[1]
    nested = "weight.nested_absmax" in tensors
    codes = weight.contiguous().view(torch.uint8).view(-1)  # it may be stored as another type (bnb_4bit_quant_storage)
    blocks = -(-numel // block_size)
    if codes.numel() != packed_bytes(numel) or absmax.numel() != blocks or (absmax.dtype == torch.uint8) != nested:
        raise ModelError(
            f"{name}.weight has {codes.numel()} bytes and {name}.weight.absmax is {_shown(absmax)}; {shape} in blocks "
            f"of {block_size} needs {packed_bytes(numel)} bytes and {blocks} scales"
        )
    absmax = absmax.view(-1)
    if not nested:
        return FourBitLinear((shape[0], shape[1]), code, block_size, codes, absmax.float(), bias, dtype)
    return FourBitLinear(
        (shape[0], shape[1]), code, block_size, codes, absmax, bias, dtype,
        nested_absmax=tensors["weight.nested_absmax"].float().view(-1),
        offset=float(state["nested_offset"]),
        nested_map=_have(name, tensors, "weight.nested_quant_map").float().view(-1),
        nested_block_size=int(state["nested_blocksize"]),
    )  # fmt: skip


def _have(name: str, tensors: Mapping[str, torch.Tensor], suffix: str) -> torch.Tensor:
    if suffix not in tensors:
        raise ModelError(f"{name}.{suffix} is missing")
    return tensors[suffix]


def _shown(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


# The other way round


def as_tensors(linear: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of one of our layers by suffix, as bitsandbytes names and shapes them; the bias is not among them."""
    if isinstance(linear, Int8Linear):
        if linear.columns is not None:
            raise ModelError("bitsandbytes' format has no place for outlier columns: set storage.outlier_columns to 0")
        return {"weight": linear.codes, "SCB": linear.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    if not isinstance(linear, FourBitLinear):
        raise ModelError(f"{type(linear).__name__} cannot be written in bitsandbytes' format; nf4, fp4 and int8 can")
    state: dict[str, Any] = {
        "quant_type": linear.code,
        "blocksize": linear.block_size,
        "dtype": str(linear.dtype).removeprefix("torch."),
        "shape": [linear.out_features, linear.in_features],
    }
    tensors = {
        "weight": linear.codes.view(-1, 1),
        "weight.absmax": linear.absmax,
        "weight.quant_map": torch.tensor(CODES[linear.code]),
    }
    if linear.nested_absmax is not None:
        assert linear.offset is not None
        values = linear.nested_map if linear.nested_map is not None else dynamic_map()
        tensors |= {"weight.nested_absmax": linear.nested_absmax, "weight.nested_quant_map": values.clone()}
        state |= {
            "nested_blocksize": linear.nested_block_size,
            "nested_dtype": _NESTED_DTYPE,
            "nested_offset": float(linear.offset),
        }
    tensors[_STATE + linear.code] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def as_config(linears: Mapping[str, nn.Module], skipped: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """`quantization_config` for config.json. `linears`: our packed layers by name, of one kind; `skipped`: others."""
    first = next(iter(linears.values()))
    common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skipped or None}
    if isinstance(first, Int8Linear):
        return {**common, "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
    assert isinstance(first, FourBitLinear)
    return {
        **common,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.code,
        "bnb_4bit_use_double_quant": first.nested_absmax is not None,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
