"""What the machine is, what it does at the moment, and how fast it multiplies matrices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

PACKAGES = ("lowrank", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "unsloth")
_MOST = 10.0
"""Seconds that measuring one product may take: where bfloat16 is emulated, a single one takes minutes."""
_PROBED_ROWS = 16
_ROWS_OF_HEAD = 448
"""Rows that meet the vocabulary in one product: the head's GEMM is measured at this height."""


def describe(device: str) -> dict[str, Any]:
    """Processor or GPU, cores, memory, system, versions."""
    found = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": sorted({"amx_bf16", "avx512_bf16"} & set(_cpuinfo("flags").split())),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cpu_name() -> str:
    """The processor as it calls itself, with family and model, which tell generations apart where the name does not."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{name} (family {family} model {model})" if family else name


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load() -> float:
    """Processes that wanted a core during the last minute. Includes our own."""
    return os.getloadavg()[0]


def peak_memory() -> int:
    """Peak resident bytes of this process.

    Not `ru_maxrss`: that starts at the size of the process we were started from.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much memory a process had (no VmHWM in /proc/self/status)")


def seconds_of(work: Callable[[], object], device: str, times: int, most: float = _MOST) -> tuple[float, float]:
    """Median time of a call, after one to warm up: by the clock, and of the processor. Once `most` seconds are over it
    is not called again; the first call counts then, if there is no other."""
    taken, taken_cpu = [], []
    begun = time.perf_counter()
    for _ in range(times + 1):
        if taken and time.perf_counter() - begun > most:
            break
        wait(device)
        started, started_cpu = time.perf_counter(), time.process_time()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
        taken_cpu.append(time.process_time() - started_cpu)
    return statistics.median(taken[1:] or taken), statistics.median(taken_cpu[1:] or taken_cpu)


def gemm_limit(
    shapes: Mapping[tuple[int, int], int],
    tokens: int,
    device: str,
    times: int = 5,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """How fast the frozen products of one step are by themselves: x W^T forward and dy W backward.

    `shapes`: (out, in) of a weight and how often the model has it. "flops_per_second" is over all of them, each
    weighted by its work, so 4N / flops_per_second is the least time a token can take. "flops_per_cpu_second" is the
    same over the processor time of this process, which other people's work does not stretch.
    """
    flops = seconds = cpu_seconds = 0.0
    each = []
    for (out_features, in_features), count in shapes.items():
        height = _ROWS_OF_HEAD if out_features > 50_000 else tokens
        height = _reachable(height, in_features, out_features, device, dtype)
        (forward, forward_cpu), (backward, backward_cpu) = _gemm_seconds(
            height, in_features, out_features, device, times, dtype
        )
        work = 2.0 * height * in_features * out_features
        each.append(
            {
                "shape": f"{height} x {in_features} x {out_features}",
                "forward": work / forward,
                "backward": work / backward,
            }
        )
        flops += count * 2.0 * work * tokens / height
        seconds += count * (forward + backward) * tokens / height
        cpu_seconds += count * (forward_cpu + backward_cpu) * tokens / height
    rates = {
        "flops_per_second": flops / seconds,
        "flops_per_cpu_second": flops / max(cpu_seconds, 1e-6),
    }  # a tick of the clock
    return {**rates, "shapes": each, "load": load()}


def _reachable(rows: int, in_features: int, out_features: int, device: str, dtype: torch.dtype) -> int:
    """So many rows, or fewer, that one product takes at most a few seconds; tried with a few."""
    x_ND = torch.randn(_PROBED_ROWS, in_features, device=device).to(dtype)
    weight_OD = torch.randn(out_features, in_features, device=device).to(dtype)
    seconds, _ = seconds_of(lambda: F.linear(x_ND, weight_OD), device, 1)
    return max(_PROBED_ROWS, min(rows, int(_PROBED_ROWS * _MOST / 4 / max(seconds, 1e-9))))


def _gemm_seconds(
    tokens: int, in_features: int, out_features: int, device: str, times: int, dtype: torch.dtype
) -> tuple[tuple[float, float], tuple[float, float]]:
    x_TD, dy_TO, weight_OD = (
        torch.randn(*size, device=device).to(dtype)
        for size in ((tokens, in_features), (tokens, out_features), (out_features, in_features))
    )
    return (
        seconds_of(lambda: F.linear(x_TD, weight_OD), device, times),
        seconds_of(lambda: dy_TO @ weight_OD, device, times),
    )


def median_of(values: Sequence[float]) -> float:
    """The median; one step in three may be disturbed on a shared machine, and a mean would show that."""
    return statistics.median(values)


def wait(device: str) -> None:
    """Until a GPU has done what it was told; a CPU has."""
    if device == "cuda":
        torch.cuda.synchronize()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")
