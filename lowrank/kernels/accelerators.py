"""What computes beside the processor, and what of ours is known to be right there.

Fast paths (Triton, the variable-length kernel, grouped products) are NVIDIA's alone. ROCm, Apple's mps and Intel's xpu
get plain torch: nobody has run the rest there, and a wrong gradient makes no noise.
"""

from __future__ import annotations

import contextlib

import torch

AMPERE = (8, 0)
"""Compute capability from which flash attention and its variable-length form run."""


def accelerators() -> list[torch.device]:
    """Those that torch can use here, the one that `auto` takes first. ROCm's is called cuda, as torch calls it."""
    found = []
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append(torch.device("xpu"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def with_index(device: torch.device) -> torch.device:
    """The same with its number; of a GPU without one, that of the current device. A process group wants to know."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def is_nvidia(device: torch.device) -> bool:
    """CUDA itself, not ROCm under its name."""
    return device.type == "cuda" and torch.version.hip is None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) of everything else."""
    return torch.cuda.get_device_capability(device) if is_nvidia(device) else (0, 0)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels launched inside run where the tensor is: Triton asks for the current device, which is cuda:0 in every
    thread until somebody says otherwise."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def has_memory_of_its_own(device: torch.device) -> bool:
    """Whether its tensors lie elsewhere than the processor's; Apple's share one memory."""
    return device.type in ("cuda", "xpu")


def processor_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself, instead of emulating it. One that `ATEN_CPU_CAPABILITY` holds
    to AVX2 does not: the instructions are AVX-512's and AMX's."""
    held_back = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return not held_back and torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]


def widest(device: torch.device) -> torch.dtype:
    """The widest float it computes in: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the widest float of its device."""
    return tensor.to(widest(tensor.device))


def name_of(device: torch.device) -> str:
    """As a person knows it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}{'' if is_nvidia(device) else ' (ROCm)'}"
    if device.type == "xpu":
        return f"{torch.xpu.get_device_name(device)} (Intel xpu)"
    return "Apple GPU (mps)" if device.type == "mps" else "processor"


def unproven(device: torch.device) -> str | None:
    """What nobody has shown to be right on it; None on a processor, where the tests run."""
    if device.type == "cpu":
        return None
    if is_nvidia(device):
        return "the GPU path has not been measured yet: run `make test-gpu`, and compare a first loss with device: cpu"
    plain = "lowrank runs plain torch there (no Triton, no variable-length attention, no grouped products)"
    return f"no test of lowrank has run on {name_of(device)}: {plain}; compare a first loss with device: cpu"
