"""4-bit codes with a scale per block: NF4 and FP4 as bitsandbytes has them, bit for bit.

    weight (any shape, flattened) -> packed: two codes to a byte, the first in the high half
                                     absmax: one float32 for each block of `block_size` values

Dettmers et al., QLoRA (arXiv 2305.14314): NF4 holds the quantiles of a normal distribution; the scales are themselves
kept in 8 bits ("double quantization"), in blocks of 256 around their mean.

Each direction has a plain torch function, which is its meaning, and faster ways that give the same bits; `quantize_way`
and `dequantize_way` say which one a device gets.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from lowrank.kernels.fused import has_proved, runs_fused
from lowrank.kernels.native import native, pointer, threads_for

NESTED_BLOCK = 256
"""Scales that share a scale under double quantization."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes accepts, and so what a checkpoint may have."""

_NF4 = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Without the sign: two bits of exponent, one of mantissa."""
CODES: dict[str, tuple[float, ...]] = {
    "nf4": tuple(map(float, _NF4.split())),
    "fp4": tuple(sign * value / 12.0 for sign in (1.0, -1.0) for value in _FP4),
}
"""What each of the 16 codes stands for, before its block's scale."""
FEW_ROWS = 16
"""Rows up to which a GPU unpacks the weight while it multiplies (decoding): one tile of its matrix units."""
_TINY = 1e-38
_CHUNK = 1 << 17
"""Values handled at a time on a CPU, so that what lies between stays in its caches."""


class _Tables:
    """What both directions look up, for one code on one device."""

    def __init__(self, code: str, device: torch.device) -> None:
        values = torch.tensor(CODES[code], dtype=torch.float32)
        self.order = values.argsort()
        self.sorted = bool((self.order.diff() == 1).all())
        in_order = values[self.order]
        bounds = (in_order[:-1] + in_order[1:]) / 2
        self.bounds = bounds.tolist()
        self.bounds_15 = bounds.to(device)
        nibble = self.order.to(torch.uint8)
        self.order_256 = (nibble.repeat_interleave(16) * 16 + nibble.repeat(16)).to(device)
        """A byte of two indices into the sorted values -> the byte of two codes."""
        self.values = values.to(device)
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
        self.pairs = pairs.contiguous().view(torch.int64).view(-1).to(device)
        """A byte -> its two values, as one 8-byte word: one look-up for two weights."""


@functools.cache
def _tables(code: str, device: torch.device) -> _Tables:
    return _Tables(code, device)


def packed_bytes(numel: int) -> int:
    """Bytes of the codes of `numel` weights."""
    return -(-numel // 2)


# Quantize


def quantize_way(device: torch.device) -> str:
    """`native` (C, compiled here) or `torch`."""
    return "native" if device.type == "cpu" and native("four_bit") is not None else "torch"


def quantize(weight: torch.Tensor, code: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8, absmax float32) of a floating-point tensor of any shape, in blocks over its flattened values."""
    flat = weight.detach().reshape(-1)
    if flat.dtype not in (torch.bfloat16, torch.float32):
        flat = flat.float()
    whole = len(flat) // block_size * block_size
    packed = torch.empty(packed_bytes(len(flat)), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-len(flat) // block_size), dtype=torch.float32, device=flat.device)
    blocks_BK, out, scales = flat[:whole].view(-1, block_size), packed[: whole // 2], absmax[: whole // block_size]
    if quantize_way(flat.device) == "native":
        _quantize_native(blocks_BK.contiguous(), code, block_size, out, scales)
    else:
        _quantize_torch(blocks_BK, code, out, scales)
    if whole < len(flat):
        rest = flat[whole:].float()
        absmax[-1:] = rest.abs().amax().clamp(min=_TINY)
        packed[whole // 2 :] = _pack(_indices((rest / absmax[-1]).clamp(-1, 1), code), code)
    return packed, absmax


def _quantize_torch(blocks_BK: torch.Tensor, code: str, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    num_blocks, block_size = blocks_BK.shape
    step = max(1, _CHUNK // block_size) if blocks_BK.device.type == "cpu" else max(1, num_blocks)
    for first in range(0, num_blocks, step):
        part = blocks_BK[first : first + step].float()
        scale = absmax[first : first + step]
        torch.amax(part.abs(), dim=1, out=scale)
        indices = _indices((part * (1.0 / scale.clamp(min=_TINY))[:, None]).view(-1), code)
        packed[first * block_size // 2 : (first + step) * block_size // 2] = _pack(indices, code)


def _indices(scaled: torch.Tensor, code: str) -> torch.Tensor:
    """How many bounds lie below each value: an index into the sorted code. Comparing 15 times beats bucketize."""
    count = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    for bound in _tables(code, scaled.device).bounds:
        count += (scaled > bound).view(torch.uint8)
    return count


def _pack(indices: torch.Tensor, code: str) -> torch.Tensor:
    tables = _tables(code, indices.device)
    if len(indices) % 2:  # a lone last code is paired with the one of zero, as bitsandbytes pads
        zero = _indices(torch.zeros(1, device=indices.device), code)
        indices = torch.cat([indices, zero])
    packed = torch.add(indices[1::2], indices[::2], alpha=16)
    return packed if tables.sorted else tables.order_256[packed.int()]


def _quantize_native(
    blocks_BK: torch.Tensor, code: str, block_size: int, packed: torch.Tensor, absmax: torch.Tensor
) -> None:
    tables = _tables(code, blocks_BK.device)
    library = native("four_bit")
    assert library is not None
    function = library.quantize_bfloat16 if blocks_BK.dtype == torch.bfloat16 else library.quantize_float32
    order, num_blocks = None if tables.sorted else tables.order_256, len(blocks_BK)
    function(
        pointer(blocks_BK), pointer(tables.bounds_15), pointer(order), ctypes.c_int64(block_size),
        ctypes.c_int64(num_blocks), pointer(packed), pointer(absmax), threads_for(num_blocks, _CHUNK // block_size),
    )  # fmt: skip


# Dequantize


def dequantize_way(device: torch.device, dtype: torch.dtype) -> str:
    """`native` (C, compiled here), `triton` on NVIDIA's GPUs where it compiles and gives the same, or `torch`."""
    if has_proved(_check_dequantize, device, dtype):
        return "triton"
    return "native" if device.type == "cpu" and _native_dequantize(dtype) is not None else "torch"


def _native_dequantize(dtype: torch.dtype) -> Any:
    """The C function that makes `dtype`; None without a compiler, or one that does not know half floats."""
    return getattr(native("four_bit"), f"dequantize_{str(dtype).removeprefix('torch.')}", None)


def dequantize(packed: torch.Tensor, absmax: torch.Tensor, code: str, block_size: int, out: torch.Tensor) -> None:
    """Fill `out` (contiguous, any shape; its dtype is the one computed in). The product with the scale is float32."""
    assert out.is_contiguous()
    way = dequantize_way(out.device, out.dtype)
    flat = out.view(-1)
    if way == "triton":
        from lowrank.kernels.four_bit_triton import dequantize_triton

        dequantize_triton(packed, absmax, _tables(code, out.device).values, block_size, flat)
    elif way == "native":
        _dequantize_native(packed, absmax, code, block_size, flat)
    else:
        dequantize_torch(packed, absmax, code, block_size, flat)
    torch.autograd.graph.increment_version(out)  # whoever kept it for a backward pass is told


def _check_dequantize(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The Triton body beside the plain function, on whole blocks and a last one that is not."""
    from lowrank.kernels.four_bit_triton import dequantize_triton

    pairs = []
    for code, block_size in (("nf4", 64), ("fp4", 128)):
        packed, absmax = quantize(torch.randn(5001, dtype=dtype, device=device), code, block_size)
        ours, plain = torch.empty(2, 5001, dtype=dtype, device=device).unbind()
        dequantize_triton(packed, absmax, _tables(code, device).values, block_size, ours)
        dequantize_torch(packed, absmax, code, block_size, plain)
        pairs.append((ours, plain))
    return pairs


def dequantize_torch(
    packed: torch.Tensor, absmax: torch.Tensor, code: str, block_size: int, flat: torch.Tensor
) -> None:
    """The meaning of `dequantize`, in torch: two weights to a look-up, then one multiplication."""
    pairs = _tables(code, flat.device).pairs
    whole = len(flat) // block_size * block_size
    step = _CHUNK * 2 // block_size * block_size if flat.device.type == "cpu" else max(whole, 1)
    for first in range(0, whole, step):
        end = min(whole, first + step)
        values = pairs.index_select(0, packed[first // 2 : end // 2].int()).view(torch.float32)
        scale = absmax[first // block_size : end // block_size, None]
        torch.mul(values.view(-1, block_size), scale, out=flat[first:end].view(-1, block_size))
    if whole < len(flat):
        values = pairs.index_select(0, packed[whole // 2 :].int()).view(torch.float32)[: len(flat) - whole]
        torch.mul(values, absmax[-1], out=flat[whole:])


def _dequantize_native(
    packed: torch.Tensor, absmax: torch.Tensor, code: str, block_size: int, flat: torch.Tensor
) -> None:
    values, function = _tables(code, flat.device).values, _native_dequantize(flat.dtype)
    num_blocks = len(flat) // block_size
    function(
        pointer(packed), pointer(absmax), pointer(values), ctypes.c_int64(block_size), ctypes.c_int64(num_blocks),
        pointer(flat), threads_for(num_blocks, _CHUNK // block_size),
    )  # fmt: skip
    whole = num_blocks * block_size
    if whole < len(flat):
        dequantize_torch(packed[whole // 2 :], absmax[-1:], code, block_size, flat[whole:])


def product(
    x_ND: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: str, block_size: int, out_features: int
) -> torch.Tensor:
    """x W^T of at most `FEW_ROWS` rows on a GPU (`reads_codes`): (N, O), W read in 4 bits and nowhere whole."""
    from lowrank.kernels.four_bit_triton import product_triton

    out_NO = torch.empty(len(x_ND), out_features, dtype=x_ND.dtype, device=x_ND.device)
    product_triton(x_ND, packed, absmax, _tables(code, x_ND.device).values, block_size, out_NO)
    return out_NO


def reads_codes(x_ND: torch.Tensor) -> bool:
    """Whether `product` is there for these operands, and the faster way."""
    return 0 < len(x_ND) <= FEW_ROWS and x_ND.shape[1] % 2 == 0 and runs_fused(x_ND, _check)


def _check(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The Triton product beside the product with the unpacked weight."""
    pairs = []
    for code, rows in (("nf4", 1), ("fp4", FEW_ROWS)):
        weight_OD = torch.randn(200, 320, dtype=dtype, device=device)
        x_ND = torch.randn(rows, 320, dtype=dtype, device=device)
        packed, absmax = quantize(weight_OD, code, 64)
        out_NO = product(x_ND, packed, absmax, code, 64, 200)
        dequantize_torch(packed, absmax, code, 64, weight_OD.view(-1))
        pairs.append((out_NO, x_ND @ weight_OD.t()))
    return pairs


# Scales of scales


@functools.cache
def dynamic_map(device: torch.device = torch.device("cpu")) -> torch.Tensor:  # noqa: B008 (never changed)
    """The 256 values of Dettmers' dynamic 8-bit code (arXiv 1511.04561 and 2110.02861), sorted, in [-0.993, 1].

    A sign, zeros that shift the exponent to the left, and what is left as a fraction.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(codes uint8, absmax float32 of each 256, offset) of float32 scales: nearest of `dynamic_map` around the mean."""
    offset = absmax.mean()
    centered = absmax - offset
    padded = torch.nn.functional.pad(centered, (0, -len(centered) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / largest.clamp(min=_TINY))[:, None]).clamp(-1, 1)
    rest = len(centered) % NESTED_BLOCK
    if rest:
        scaled[-1] = (padded[-1] / largest[-1].clamp(min=_TINY)).clamp(-1, 1)
    values = dynamic_map(absmax.device)
    codes = torch.bucketize(scaled.view(-1), (values[:-1] + values[1:]) / 2).to(torch.uint8)
    return codes[: len(absmax)], largest, offset.item()


def dequantize_scales(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor,
    values: torch.Tensor,
    block_size: int = NESTED_BLOCK,
) -> torch.Tensor:
    """float32 scales again; `values` are the 256 that `codes` point to. `offset`: one float32."""
    library = native("four_bit") if codes.device.type == "cpu" else None
    if library is not None:
        assert codes.is_contiguous()
        assert values.is_contiguous()
        assert absmax.is_contiguous()
        out = torch.empty(len(codes), dtype=torch.float32)
        library.dequantize_scales(
            pointer(codes), pointer(values), pointer(absmax), ctypes.c_float(offset.item()), ctypes.c_int64(block_size),
            ctypes.c_int64(len(codes)), pointer(out), threads_for(len(codes), _CHUNK),
        )  # fmt: skip
        return out
    return dequantize_scales_torch(codes, absmax, offset, values, block_size)


def dequantize_scales_torch(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor,
    values: torch.Tensor,
    block_size: int = NESTED_BLOCK,
) -> torch.Tensor:
    """The meaning of `dequantize_scales`, in torch."""
    found = values.index_select(0, codes.int())
    whole = len(found) // block_size * block_size
    found[:whole].view(-1, block_size).mul_(absmax[: whole // block_size, None])
    if whole < len(found):
        found[whole:] *= absmax[-1]
    return found.add_(offset)
