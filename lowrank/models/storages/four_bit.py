"""A frozen linear layer in 4 bits: what the storages nf4 and fp4 and bitsandbytes' checkpoints have in common."""

from __future__ import annotations

import torch
from torch import nn

from lowrank.kernels.four_bit import (
    NESTED_BLOCK,
    dequantize,
    dequantize_scales,
    dynamic_map,
    packed_bytes,
    product,
    quantize,
    quantize_scales,
    reads_codes,
)
from lowrank.kernels.scratch import scratch
from lowrank.models.storages.packed import PackedLinear, bias_of, weight_of


class FourBitLinear(PackedLinear):
    """Codes, two to a byte; their scales in `absmax`: float32, or 8-bit codes with scales of their own."""

    codes: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    nested_map: torch.Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        code: str,
        block_size: int,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        bias_O: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        nested_absmax: torch.Tensor | None = None,
        offset: float = 0.0,
        nested_map: torch.Tensor | None = None,
        nested_block_size: int = 256,
    ) -> None:
        """`shape` is (O, D). `nested_map`: what 8-bit scales point to, where it is not `dynamic_map`."""
        super().__init__(shape[1], shape[0], bias_O, dtype)
        self.code, self.block_size = code, block_size
        self.nested_block_size = nested_block_size
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        nested = nested_absmax is not None  # its offset is a tensor for what differs between layers compiled as one
        self.register_buffer("offset", torch.tensor(offset, device=nested_absmax.device) if nested else None)
        own_map = nested_map is not None and not torch.equal(nested_map, dynamic_map(nested_map.device))
        self.register_buffer("nested_map", nested_map if own_map else None)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., O), in the dtype of `x`; a few rows without gradient (decoding) straight from the codes."""
        trains = torch.is_grad_enabled() and x.requires_grad
        x_ND = x if trains else x.reshape(-1, self.in_features)
        if trains or x.dtype != self.dtype or not reads_codes(x_ND):
            return super().product(x)
        out_NO = product(x_ND, self.codes, self.scales(), self.code, self.block_size, self.out_features)
        if self.bias is not None:
            out_NO += self.bias
        return out_NO.view(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> torch.Tensor:
        out = scratch((self.out_features, self.in_features), self.dtype, self.codes.device)
        dequantize(self.codes, self.scales(), self.code, self.block_size, out)
        return out

    def scales(self) -> torch.Tensor:
        """The float32 scale of each block."""
        if self.nested_absmax is None:
            return self.absmax
        assert self.offset is not None
        values = self.nested_map if self.nested_map is not None else dynamic_map(self.absmax.device)
        return dequantize_scales(self.absmax, self.nested_absmax, self.offset, values, self.nested_block_size)

    def extra_repr(self) -> str:
        double = ", double_quant" if self.nested_absmax is not None else ""
        return f"{super().extra_repr()}, {self.code}, block_size={self.block_size}{double}"


def four_bit_bytes(numel: int, block_size: int, double_quant: bool) -> int:
    """Codes and scales of `numel` weights, and the offset of double quantization."""
    blocks = -(-numel // block_size)
    return packed_bytes(numel) + (blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if double_quant else 4 * blocks)


def four_bit_of(linear: nn.Module, code: str, block_size: int, double_quant: bool) -> FourBitLinear:
    """The layer in 4 bits; it computes in the dtype its weight has now."""
    weight_OD = weight_of(linear)
    packed, absmax = quantize(weight_OD, code, block_size)
    shape, dtype, bias_O = (weight_OD.shape[0], weight_OD.shape[1]), weight_OD.dtype, bias_of(linear)
    if not double_quant:
        return FourBitLinear(shape, code, block_size, packed, absmax, bias_O, dtype)
    codes, nested_absmax, offset = quantize_scales(absmax)
    return FourBitLinear(
        shape, code, block_size, packed, codes, bias_O, dtype, nested_absmax=nested_absmax, offset=offset
    )
