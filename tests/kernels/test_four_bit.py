"""NF4 and FP4: the same bits as bitsandbytes, by every way there is."""

from __future__ import annotations

import ctypes
import itertools
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from lowrank.kernels import four_bit, native
from lowrank.kernels.four_bit import (
    CODES,
    dequantize,
    dequantize_scales,
    dequantize_scales_torch,
    dequantize_torch,
    dynamic_map,
    quantize,
    quantize_scales,
    quantize_way,
)

CPU = torch.device("cpu")
SHAPES = [(64, 64), (7, 96), (5, 33), (1, 31), (2, 2), (300, 257)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "torch"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to quantize, whichever this machine would take."""
    if request.param == "torch":
        monkeypatch.setattr(four_bit, "native", lambda name: None)
    elif native.native("four_bit") is None:
        pytest.skip("no C compiler here")
    assert quantize_way(CPU) == request.param
    return request.param


@pytest.mark.parametrize("code", CODES)
def test_codebooks_are_bitsandbytes(code: str) -> None:
    assert torch.equal(torch.tensor(CODES[code]), bnb.get_4bit_type(code, device="cpu"))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", CODES)
def test_codes_are_bitsandbytes_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype, code: str, way: str) -> None:
    for seed, block_size in enumerate((32, 64, 128)):
        torch.manual_seed(seed)
        weight = (torch.randn(shape) * 10 ** torch.randn(shape)).to(dtype)
        weight[0, 0] = 0.0
        packed, absmax = quantize(weight, code, block_size)
        theirs, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=code)
        assert torch.equal(packed, theirs.view(-1))
        assert torch.equal(absmax, state.absmax)


def test_a_block_of_zeros(way: str) -> None:
    packed, absmax = quantize(torch.zeros(3, 64), "nf4", 64)
    out = torch.ones(3, 64)
    dequantize(packed, absmax, "nf4", 64, out)
    assert torch.equal(out, torch.zeros(3, 64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("code", CODES)
def test_dequantize_is_code_times_scale(shape: tuple[int, int], dtype: torch.dtype, code: str) -> None:
    """By the formula, and by the way this machine takes. bitsandbytes itself is no oracle here: where rows are no whole
    number of blocks (7 x 96) its CPU kernel gives other weights than its own codes say."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    for block_size in (32, 64, 2048):
        packed, absmax = quantize(weight, code, block_size)
        nibbles = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: weight.numel()].int()
        expected = torch.tensor(CODES[code])[nibbles] * absmax.repeat_interleave(block_size)[: weight.numel()]
        for function in (dequantize, dequantize_torch):
            out = torch.full(shape, 7.0, dtype=dtype)
            function(packed, absmax, code, block_size, out if function is dequantize else out.view(-1))
            assert torch.equal(out.view(-1), expected.to(dtype))


def test_bitsandbytes_dequantizes_the_same_where_it_is_right() -> None:
    weight = torch.randn(128, 192, dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    out = torch.empty_like(weight)
    dequantize(packed.view(-1), state.absmax, "nf4", 64, out)
    assert torch.equal(out, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    "flags", ["-march=native", "-march=x86-64-v2", "-march=x86-64"], ids=["here", "look-up", "plain"]
)
def test_dequantize_native_as_other_processors_have_it(flags: str, tmp_path: Path) -> None:
    """With the look-up instruction and without; scales that are no numbers, or too large for the type, as well."""
    compiler = shutil.which("cc")
    if compiler is None or ("x86" in flags and platform.machine() != "x86_64"):
        pytest.skip("nothing to compile it with here")
    source, made = Path(four_bit.__file__).with_name("four_bit.c"), tmp_path / "made.so"
    command = [compiler, "-O3", flags, "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(made), str(source)], check=True)
    library = ctypes.CDLL(str(made))
    packed = torch.randint(256, (64 * 32,), dtype=torch.uint8)
    absmax = torch.cat([10 ** torch.randn(59), torch.tensor([0.0, 1e-40, 1e38, float("inf"), float("nan")])])
    for code, dtype in itertools.product(CODES, DTYPES):
        values, ours, expected = torch.tensor(CODES[code]), torch.empty(64 * 64, dtype=dtype), torch.empty(64 * 64)
        function = getattr(library, f"dequantize_{str(dtype).removeprefix('torch.')}")
        whole = native.pointer(packed), native.pointer(absmax), native.pointer(values)
        function(*whole, ctypes.c_int64(64), ctypes.c_int64(64), native.pointer(ours), ctypes.c_int(1))
        dequantize_torch(packed, absmax, code, 64, expected)
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(7.0), expected.to(dtype).nan_to_num(7.0))


def test_threads_share_a_matrix_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1000, 640, dtype=torch.bfloat16)
    packed, absmax = quantize(weight, "nf4", 64)
    whole = torch.empty_like(weight)
    dequantize_torch(packed, absmax, "nf4", 64, whole.view(-1))

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    out = torch.empty_like(weight)
    dequantize(packed, absmax, "nf4", 64, out)
    assert torch.equal(out, whole)
    again, scales = quantize(weight, "nf4", 64)
    assert torch.equal(again, packed)
    assert torch.equal(scales, absmax)


@pytest.mark.parametrize("count", [1, 77, 256, 5000])
def test_double_quantization(count: int) -> None:
    """Codes are the nearest there are. bitsandbytes' CPU kernel divides by an approximate reciprocal, so one scale in
    some hundreds is rounded the other way there; never by more than one step."""
    torch.manual_seed(count)
    absmax = torch.rand(count) * 3 + 0.1
    codes, nested, offset = quantize_scales(absmax)
    theirs, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert offset == absmax.mean().item()
    assert torch.equal(nested, state.absmax)
    difference = (codes.int() - theirs.int()).abs()
    assert difference.max() <= 1 or count == 1  # a lone scale is its mean: zero, for which they have another code
    assert (difference > 0).float().mean() < 0.02 or count == 1
    mean = torch.tensor(offset)
    ours = dequantize_scales(codes, nested, mean, dynamic_map())
    assert torch.equal(ours, dequantize_scales_torch(codes, nested, mean, dynamic_map()))
    other = dequantize_scales(theirs, nested, mean, dynamic_map())
    assert (ours - absmax).norm() <= (other - absmax).norm() + 1e-6
    assert torch.equal(bnb.dequantize_blockwise(codes, state) + offset, ours)  # and what the codes mean is the same


def test_the_error_on_normal_weights() -> None:
    """docs/quantization.md's numbers: 2048^2 values of N(0, 1)."""
    torch.manual_seed(0)
    weight = torch.randn(2048, 2048)
    expected = {
        ("nf4", 32): 0.0873,
        ("nf4", 64): 0.0920,
        ("nf4", 128): 0.0956,
        ("nf4", 256): 0.0987,
        ("fp4", 64): 0.1219,
    }
    for (code, block_size), error in expected.items():
        out = torch.empty_like(weight)
        dequantize(*quantize(weight, code, block_size), code, block_size, out)
        assert ((out - weight).norm() / weight.norm()).item() == pytest.approx(error, abs=3e-4)


def test_no_compiler_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    native.native.cache_clear()
    try:
        assert native.native("four_bit") is None
        assert quantize_way(CPU) == "torch"
    finally:
        native.native.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("code", CODES)
def test_on_a_gpu(code: str) -> None:
    weight = torch.randn(300, 130, device="cuda", dtype=torch.bfloat16)
    packed, absmax = quantize(weight, code, 64)
    on_cpu = quantize(weight.cpu(), code, 64)
    assert torch.equal(packed.cpu(), on_cpu[0])
    assert torch.equal(absmax.cpu(), on_cpu[1])
    out, expected = torch.empty_like(weight), torch.empty_like(weight).cpu()
    dequantize(packed, absmax, code, 64, out)
    dequantize(*on_cpu, code, 64, expected)
    assert torch.equal(out.cpu(), expected)
