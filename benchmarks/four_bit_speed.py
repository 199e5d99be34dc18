"""NF4 of one 4096 x 4096 bfloat16 matrix: quantise and dequantise, ours and bitsandbytes', in turns.

    python -m benchmarks.four_bit_speed --threads 2

Takes a minute. Every round each way has four calls: the first finds the processor's caches full of other work, the
others follow at once; medians of both kinds. Dequantising is into memory that is there already (as a layer
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
    from lowrank.models.storages.nf4 import Config as Nf4

    packed, absmax = four_bit.quantise(weight, "nf4", BLOCK)
    out = torch.empty_like(weight)
    linear = nn.Linear(SIZE, SIZE, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = Nf4().wrap(linear)
    theirs, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(theirs.view(-1), packed)
    return {
        "quantise": lambda: four_bit.quantise(weight, "nf4", BLOCK),
        "quantise, double": lambda: Nf4().wrap(linear),
        "dequantise": lambda: four_bit.dequantise(packed, absmax, "nf4", BLOCK, out),
        "dequantise, double": layer.dense_weight,
        "quantise, torch": lambda: _without_native(lambda: four_bit.quantise(weight, "nf4", BLOCK)),
        "dequantise, torch": lambda: four_bit.dequantise_torch(packed, absmax, "nf4", BLOCK, out.view(-1)),
        "bitsandbytes quantise": lambda: bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4"),
        "bitsandbytes dequantise": lambda: bnb.dequantize_4bit(theirs, state),
    }


def _without_native(work: Callable[[], object]) -> None:
    from lowrank.kernels import four_bit

    way, four_bit.quantise_way = four_bit.quantise_way, lambda device: "torch"
    try:
        work()
    finally:
        four_bit.quantise_way = way


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
            "quantise": four_bit.quantise_way(weight.device),
            "dequantise": four_bit.dequantise_way(weight.device, weight.dtype),
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
