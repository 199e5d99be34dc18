"""The device by itself and our kernels by themselves: products, copies, unpacking, and each Triton kernel beside the
plain function of the same meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_day.day import Day
from benchmarks.machine import gemm_limit
from lowrank.kernels.four_bit import dequantize, dequantize_torch, quantize
from lowrank.kernels.gated import gated
from lowrank.kernels.logprobs import Head, logprobs
from lowrank.kernels.rms_norm import rms_norm


def measure(day: Day) -> None:
    """All of them; each by itself, so that one that fails leaves the others."""
    size = 64 if day.tiny else 4096
    limit = gemm_limit({(size, size): 1, (4 * size, size): 1}, size, day.device.name, times=3, dtype=day.dtype)
    day.add("kernels", {"what": f"products, {day.dtype}", "flops_per_second": limit["flops_per_second"]})
    count = 1 << (16 if day.tiny else 29)
    day.add("kernels", {"what": "copy on the device", "bytes_per_second": _copy_rate(day, count)})
    for name, make in {"nf4 unpack": _nf4, "fp4 unpack": _fp4}.items():
        day.add("kernels", {"what": name, **make(day)})
    for name, function, bytes_moved in _passes(day):
        seconds = day.device.seconds(function, 5)
        day.add("kernels", {"what": name, "seconds": seconds, "bytes_per_second": bytes_moved / seconds})


def _copy_rate(day: Day, count: int) -> float:
    """Bytes read and written a second."""
    one = torch.zeros(count, dtype=torch.uint8, device=day.device.name)
    other = torch.empty_like(one)
    return 2 * count / day.device.seconds(lambda: other.copy_(one), 5)


def _nf4(day: Day) -> dict[str, Any]:
    return _unpack(day, "nf4")


def _fp4(day: Day) -> dict[str, Any]:
    return _unpack(day, "fp4")


def _unpack(day: Day, code: str) -> dict[str, Any]:
    shape = (96, 64) if day.tiny else (14_336, 4096)
    weight = torch.randn(shape, device=day.device.name, dtype=day.dtype)
    packed, absmax = quantize(weight, code, 64)
    out = torch.empty_like(weight)
    expected = torch.empty_like(weight)
    seconds = day.device.seconds(lambda: dequantize(packed, absmax, code, 64, out), 5)
    plain = day.device.seconds(lambda: dequantize_torch(packed, absmax, code, 64, expected.view(-1)), 3)
    moved = packed.numel() + 4 * absmax.numel() + out.numel() * out.element_size()
    return {
        "seconds": seconds,
        "bytes_per_second": moved / seconds,
        "faster_than_plain_torch": plain / seconds,
        "same_bits": torch.equal(out, expected),
    }


def _passes(day: Day) -> list[tuple[str, Callable[[], object], int]]:
    """Forward and backward of what lies between the products."""
    tokens, width, wide, vocabulary = (32, 64, 96, 512) if day.tiny else (8192, 4096, 14_336, 128_256)
    x = torch.randn(tokens, width, device=day.device.name, dtype=day.dtype, requires_grad=True)
    weight = torch.ones(width, device=day.device.name, dtype=day.dtype)
    gate, up = (
        torch.randn(tokens, wide, device=day.device.name, dtype=day.dtype, requires_grad=True) for _ in range(2)
    )
    rows = min(tokens, 1024)
    head = Head(torch.randn(vocabulary, width, device=day.device.name, dtype=day.dtype) * 0.02)
    target = torch.zeros(rows, dtype=torch.int64, device=day.device.name)

    def run(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def both() -> None:
            y = function()
            y.backward(torch.ones_like(y))

        return both

    size, silu = x.element_size(), torch.nn.functional.silu
    return [
        ("RMSNorm, forward and backward", run(lambda: rms_norm(x, weight, 1e-6)), 5 * tokens * width * size),
        ("SwiGLU, forward and backward", run(lambda: gated(gate, up, silu)), 8 * tokens * wide * size),
        ("log-probabilities, forward and backward", run(lambda: logprobs(x[:rows], target, head)),
         2 * vocabulary * width * size),
    ]  # fmt: skip
