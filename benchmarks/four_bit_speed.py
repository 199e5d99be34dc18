"""NF4 of one 4096 x 4096 bfloat16 matrix: quantize and dequantize, ours and bitsandbytes', in turns.

    python -m benchmarks.four_bit_speed --threads 2

Takes a minute. Every round each way has four calls: the first finds the processor's caches full of other work, the
others follow at once; medians of both kinds. Dequantizing is into memory that is there already (as a layer
does it) for ours, and as `bitsandbytes.functional` does it for theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE, BLOCK = 4096, 64
_CALLS = 4


def ways(weight: Any) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    import bitsandbytes.functional as bnb
    import torch
    from torch import nn

    from lowrank.kernels import four_bit
    from lowrank.models.storages.nf4 import NF4Config

    packed, absmax = four_bit.quantize(weight, "nf4", BLOCK)
    out = torch.empty_like(weight)
    linear = nn.Linear(SIZE, SIZE, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = NF4Config().wrap(linear)
    theirs, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(theirs.view(-1), packed)
    return {
        "quantize": lambda: four_bit.quantize(weight, "nf4", BLOCK),
        "quantize, double": lambda: NF4Config().wrap(linear),
        "dequantize": lambda: four_bit.dequantize(packed, absmax, "nf4", BLOCK, out),
        "dequantize, double": layer.dense_weight,
        "quantize, torch": lambda: _without_native(lambda: four_bit.quantize(weight, "nf4", BLOCK)),
        "dequantize, torch": lambda: four_bit.dequantize_torch(packed, absmax, "nf4", BLOCK, out.view(-1)),
        "bitsandbytes quantize": lambda: bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4"),
        "bitsandbytes dequantize": lambda: bnb.dequantize_4bit(theirs, state),
    }


def _without_native(work: Callable[[], object]) -> None:
    from lowrank.kernels import four_bit

    way, four_bit.quantize_way = four_bit.quantize_way, lambda device: "torch"
    try:
        work()
    finally:
        four_bit.quantize_way = way


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch and bitsandbytes start theirs
    warnings.filterwarnings("ignore")
    import torch

    from benchmarks.machine import describe, load
    from lowrank.kernels import four_bit

    torch.set_num_threads(options.threads)
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    timed = ways(weight)
    first: dict[str, list[float]] = {name: [] for name in timed}
    again: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.rounds + 1):  # the first compiles and faults pages in
        for name, work in timed.items():
            for call in range(_CALLS):
                started = time.perf_counter()
                work()
                (again if call else first)[name].append(1e3 * (time.perf_counter() - started))
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe("cpu"),
        "matrix": f"{SIZE} x {SIZE} bfloat16, blocks of {BLOCK}",
        "ways": {
            "quantize": four_bit.quantize_way(weight.device),
            "dequantize": four_bit.dequantize_way(weight.device, weight.dtype),
        },
        "milliseconds": {
            name: {
                "median of first calls": round(statistics.median(first[name][1:]), 2),
                "median of following calls": round(statistics.median(again[name][_CALLS - 1 :]), 2),
                "fastest": round(min(first[name][1:] + again[name]), 2),
            }
            for name in timed
        },
        "load": load(),
    }
    print(json.dumps(found, indent=1))
    options.results.mkdir(parents=True, exist_ok=True)
    stem = f"four_bit_speed_{options.threads}-threads_{found['date'][:10]}"
    (options.results / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
