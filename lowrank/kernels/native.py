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
from pathlib import Path

import torch

from lowrank.kernels.cache_folder import cache_folder

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
_OPENMP = ("-fopenmp", "-Wl,--as-needed", *(str(each) for each in Path(torch.__file__).parent.glob("lib/libgomp*")))
"""Threads of torch's own runtime. Others would wait for a core on which torch's spin, as they do for a while after each
operator: dequantizing then took two to three times as long as with one thread."""


@functools.cache
def native(name: str) -> ctypes.CDLL | None:
    """The library of `<name>.c` of this folder, compiled once per machine; None where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("LOWRANK_NATIVE") == "0" or compiler is None or platform.system() == "Windows":
        return None
    source = Path(__file__).with_name(f"{name}.c")
    machine = torch.backends.cpu.get_cpu_capability() + platform.machine() + platform.processor() + _cpu()
    key_parts = (source.read_text(), machine, *_FLAGS, *_OPENMP)
    key = hashlib.sha256("\0".join(key_parts).encode()).hexdigest()[:16]
    library = cache_folder() / "native" / f"{name}-{key}.so"
    try:
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                made = Path(folder) / library.name
                for threads in (_OPENMP, ()):  # not every compiler has OpenMP
                    command = [compiler, *_FLAGS, "-o", str(made), str(source), *threads]
                    done = subprocess.run(command, check=not threads, capture_output=True, timeout=60)
                    if done.returncode == 0:
                        break
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
    """Where a tensor's data begin; null for None. TypeError for a tensor whose data are not its own to read there (a
    sharded or wrapped one, one on a device, or one whose memory was let go of): a C kernel would read whatever lies at
    that address."""
    if tensor is None:
        return ctypes.c_void_p(None)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu" or tensor.is_sparse:
        raise TypeError(
            f"a C kernel reads plain tensors in host memory, not a {type(tensor).__name__} on {tensor.device}"
        )
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise TypeError("a C kernel reads tensors that are there, and this one's memory has been let go of")
    return ctypes.c_void_p(tensor.data_ptr())


def threads_for(total: int, least: int) -> ctypes.c_int:
    """As many threads as torch uses, none with less than `least` of `total`."""
    return ctypes.c_int(max(1, min(torch.get_num_threads(), total // least)))
