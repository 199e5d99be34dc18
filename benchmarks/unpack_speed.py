"""Packed weights made dense without AVX-512, ours and bitsandbytes', in turns: GB of dense weight a processor second.

    python -m benchmarks.unpack_speed                    as on a processor with AVX2 alone
    python -m benchmarks.unpack_speed --march native     with all this one has

A minute on one thread. Our C is compiled for `--march`, and torch held to AVX2 (`ATEN_CPU_CAPABILITY`). bitsandbytes'
library asks the processor; without AVX-512 it takes the loop that it takes everywhere for rows that are no multiple of
16, so there it is given the same bytes as a matrix of rows of 8. Ours fills memory that is there, as a layer does;
bitsandbytes is timed as it is called, and its library by itself into memory that is there. int8: theirs is torch, and
gives float32 only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 64
MATRICES = ((896, 4864), (4096, 4096), (4096, 14336))
"""(O, D): 0.5B's down projection, 8B's attention and its down projection."""
OURS, CALLED, LIBRARY = "lowrank", "bitsandbytes as called", "bitsandbytes' library alone"


def nf4_ways(weight_OD: Any, narrow: bool) -> dict[str, Callable[[], Any]]:
    """What unpacks NF4 with a float32 scale per 64, by name; each gives the dense weight. `narrow`: without AVX-512."""
    import bitsandbytes.functional as bnb
    import torch
    from bitsandbytes.cextension import lib

    from lowrank.kernels import four_bit

    packed, absmax = four_bit.quantize(weight_OD, "nf4", BLOCK)
    out_OD, theirs_OD = torch.empty_like(weight_OD), torch.empty_like(weight_OD)
    codes, state = bnb.quantize_4bit(weight_OD, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(codes.view(-1), packed)
    rows, columns = (weight_OD.numel() // 8, 8) if narrow else weight_OD.shape
    state.shape = torch.Size((rows, columns))
    function = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{'fp32' if out_OD.dtype == torch.float32 else 'bf16'}")

    def ours() -> Any:
        four_bit.dequantize(packed, absmax, "nf4", BLOCK, out_OD)
        return out_OD

    def library() -> Any:
        pointers = (ctypes.c_void_p(each.data_ptr()) for each in (codes, state.absmax, theirs_OD))
        function(*pointers, *map(ctypes.c_longlong, (BLOCK, rows, columns)))
        return theirs_OD

    return {OURS: ours, CALLED: lambda: bnb.dequantize_4bit(codes, state).view_as(out_OD), LIBRARY: library}


def int8_ways(weight_OD: Any) -> dict[str, Callable[[], Any]]:
    """What unpacks a byte a weight with a scale per row, by name."""
    import bitsandbytes.functional as bnb
    import torch
    from torch import nn

    from lowrank.models.storages.int8 import Int8Config

    linear = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OD, requires_grad=False)
    layer = Int8Config().wrap(linear)
    codes, absmax = layer.codes, layer.absmax
    assert isinstance(codes, torch.Tensor)
    return {
        OURS: layer.dense_weight,
        CALLED: lambda: bnb.int8_vectorwise_dequant(codes, absmax).to(weight_OD.dtype),
    }


def measured(ways: dict[str, Callable[[], Any]], size: int, rounds: int, least: float) -> dict[str, Any]:
    """GB a processor second of each way, median over rounds, and ours over each other, median of the rounds' ratios."""
    import torch

    first, *others = [work().float().clone() for work in ways.values()]
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-2, atol=1e-6)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            calls, started = 0, time.process_time()
            while (taken := time.process_time() - started) < least or not calls:
                work()
                calls += 1
            rates[name].append(calls * size / taken / 1e9)
    ours = rates[OURS]
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(ours, own)), 2)
        for name, own in rates.items()
        if name != OURS
    }
    return {
        "GB per processor second": {name: round(statistics.median(own), 2) for name, own in rates.items()},
        "lowrank over": ratios,
    }


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--march", default="x86-64-v3", help="of our C; x86-64-v3 is AVX2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--least", type=float, default=0.1, help="processor seconds of each way in each round")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    narrow = options.march != "native"
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch and bitsandbytes start theirs
    if narrow:
        os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    warnings.filterwarnings("ignore")
    import torch

    from benchmarks.machine import describe, load
    from lowrank.kernels import four_bit, native

    torch.set_num_threads(1)
    flags = tuple(f"-march={options.march}" if flag == "-march=native" else flag for flag in native._FLAGS)
    native._FLAGS = flags  # type: ignore[assignment]
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe("cpu"),
        "march": options.march,
        "torch": torch.backends.cpu.get_cpu_capability(),
        "ours": four_bit.dequantize_way(torch.device("cpu"), torch.float32),
        "load": [load()],
        "matrices": [],
    }
    for shape in MATRICES:
        for dtype in (torch.float32, torch.bfloat16):
            weight_OD = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
            size = weight_OD.numel() * weight_OD.element_size()
            for storage, ways in (("nf4", nf4_ways(weight_OD, narrow)), ("int8", int8_ways(weight_OD))):
                own = measured(ways, size, options.rounds, options.least)
                name = str(dtype).removeprefix("torch.")
                found["matrices"].append({"shape": shape, "dtype": name, "storage": storage, **own})
                print(storage, name, shape, own, flush=True)
    found["load"].append(load())
    options.results.mkdir(parents=True, exist_ok=True)
    stem = f"unpack_speed_{options.march}_{found['date'][:10]}"
    (options.results / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
