"""Where are we, and is what we measure right: the machine, and `make test-gpu` with the most telling first."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_day.day import Day
from benchmarks.machine import describe

ROOT = Path(__file__).parents[2]
TESTS = ("tests/test_on_gpu.py", "tests/kernels", "tests/models/test_varlen_calls.py")
"""In this order; the rest of `pytest -m gpu` needs packages that a measuring machine may not have."""
LIMIT = 115.0


def environment(day: Day) -> None:
    """Machine, driver, versions, what optional packages are there."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        **describe("cuda" if day.device.is_gpu else "cpu"),
    }
    if day.device.is_gpu:
        properties = torch.cuda.get_device_properties(0)
        found["gpu_memory_bytes"] = properties.total_memory
        found["capability"] = torch.cuda.get_device_capability(0)
        found["multiprocessors"] = properties.multi_processor_count
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True)
        found["nvidia_smi"] = done.stdout[-3000:]
    names = ("triton", "bitsandbytes", "trl", "peft", "liger_kernel", "unsloth", "flash_attn", "datasets")
    found["there"] = [name for name in names if importlib.util.find_spec(name)]
    day.set("environment", found)


def tests(day: Day) -> None:
    """Their last lines. In a rehearsal they are only collected: they need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5"]
    command += ["--collect-only"] if not day.device.is_gpu else []
    there = [path for path in TESTS if (ROOT / path).exists()]
    if not importlib.util.find_spec("bitsandbytes"):
        command += ["--ignore=tests/kernels/test_four_bit.py"]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *there], cwd=ROOT, capture_output=True, text=True, timeout=min(LIMIT, max(5.0, day.left))
        )
        found = {"exit": done.returncode, "output": (done.stdout + done.stderr)[-6000:]}
    except subprocess.TimeoutExpired as error:
        found = {"exit": "out of time", "output": str(error.stdout or b"")[-6000:]}
    day.set("tests", {**found, "seconds": time.perf_counter() - started})
