"""Small C kernels, compiled on the machine they run on; every one has a torch function of the same meaning beside it.

torch.compile would need a C++ compiler too and, for these loops, takes 24 s and gives code 20 times slower
(docs/log.md). Where there is no compiler, or LOWRANK_NATIVE=0 says not to, the torch function runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lowrank.kernels.cache_folder import cache_folder

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")


@functools.cache
def native(name: str) -> ctypes.CDLL | None:
    """The library of `<name>.c` of this folder, compiled once per machine; None where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("LOWRANK_NATIVE") == "0" or compiler is None or platform.system() == "Windows":
        return None
    source = Path(__file__).with_name(f"{name}.c")
    machine = torch.backends.cpu.get_cpu_capability() + platform.machine() + platform.processor() + _cpu()
    key = hashlib.sha256("\0".join((source.read_text(), machine, *_FLAGS)).encode()).hexdigest()[:16]
    library = cache_folder() / "native" / f"{name}-{key}.so"
    try:
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                made = Path(folder) / library.name
                command = [compiler, *_FLAGS, "-o", str(made), str(source)]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                os.replace(made, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def _cpu() -> str:
    """What the compiler's `native` depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "".join(line for line in lines[:40] if line.startswith(("flags", "Features", "model name")))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's data begin; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def in_parts(work: object, total: int, least: int) -> None:
    """Call `work(first, end)` over [0, total) on as many threads as torch uses, none with less than `least`.

    ctypes gives the interpreter lock free while a kernel runs.
    """
    assert callable(work)
    parts = max(1, min(torch.get_num_threads(), total // least))
    edges = [total * part // parts for part in range(parts + 1)]
    if parts == 1:
        work(0, total)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))
