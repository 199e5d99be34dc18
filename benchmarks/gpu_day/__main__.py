"""Everything that can be asked of a GPU in nine minutes: `bash benchmarks/gpu_day.sh`.

--rehearse     the whole script on a processor with tiny shapes, so that the day is not spent on typing errors
--sections     only these, in this order
--out FOLDER   gpu_day.json and gpu_day.md, written anew after everything that was measured
--wheels DIR   nothing is measured: what a machine without network lacks is put into DIR (see wheels.py)
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu_day import checks, decoding, kernels, memory, peers, profiling, training
from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.device import Device

SECTIONS: dict[str, tuple[Callable[[Day], None], float]] = {
    "environment": (checks.environment, 15.0),
    "tests": (checks.tests, checks.LIMIT),
    "kernels": (kernels.measure, 25.0),
    "training": (training.measure, 190.0),
    "plans": (memory.plans, 40.0),
    "decoding": (decoding.measure, 60.0),
    "profiles": (profiling.measure, 35.0),
    "longest": (memory.longest, 60.0),
    "compiled": (decoding.compiled, 0.0),
    "unsloth": (peers.unsloth, 0.0),
}
"""What is run, and the seconds each may begin something new in; together nine minutes. 0: what is left."""


def run(day: Day, names: Sequence[str]) -> None:
    """The sections. One that fails is written down, and the next one begins."""
    for name in names:
        section, seconds = SECTIONS[name]
        if day.left < 5.0:
            day.note(f"no time for {name}")
            continue
        started = time.perf_counter()
        day.begin(seconds or day.left)
        try:
            section(day)
        except Exception as error:  # whatever it is, what comes after it can still be measured
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            day.add("failures", f"{name}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})"[:1000])
        training.free()
        taken = day.result.setdefault("seconds", {})
        taken[name] = time.perf_counter() - started
        day.write()
        print(f"{name}: {taken[name]:.1f} s, {day.left:.0f} s left", flush=True)


def day_of(options: argparse.Namespace) -> Day:
    """A GPU's, or a rehearsal's."""
    if options.rehearse:
        given = {"tiny": True, "peers": options.peers, "cells": options.cells, "dtype": torch.float32}
        return Day(Device("cpu"), options.out, options.seconds, **given)
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use here; --rehearse runs the same on the processor")
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if fast else torch.float16
    return Day(Device("cuda"), options.out, options.seconds, peers=options.peers, cells=options.cells, dtype=dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code is that of a rehearsal: on the day itself what was measured counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu_day_results"))
    parser.add_argument("--seconds", type=float, default=535.0)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without TRL's turns")
    parser.add_argument("--cells", type=int, help="at most so many points of each table")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    day = day_of(options)
    day.set("rehearsal", options.rehearse)
    run(day, options.sections)
    print(f"{options.out / 'gpu_day.md'}")
    failed = bool(day.result.get("failures"))
    return int(options.rehearse and failed)


if __name__ == "__main__":
    sys.exit(main())
