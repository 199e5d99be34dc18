"""Which of the Triton bodies run: on NVIDIA's GPUs, most in 16 bits alone, and only after they gave what the plain
function gives.

Each is compared with its plain function once per process, dtype and device, on random numbers. One that does not
compile, or differs by more than rounding, is left alone and said so; the plain function computes then.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Callable, Generator

import torch

from lowrank.kernels.accelerators import is_nvidia
from lowrank.notices import log_notice

_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Of the norm of the difference. A wrong kernel is wrong by tenths."""

_HALVES = (torch.bfloat16, torch.float16)

Check = Callable[[torch.device, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]]
"""Pairs of what the kernel and what the plain function gave."""
_found: dict[tuple[Check, torch.device, torch.dtype], bool] = {}
_lock = threading.Lock()
_plain = [0]
"""How many are inside `plain_only`: not by thread, since a GPU's backward passes have threads of their own."""


@functools.cache
def has_triton() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def plain_only() -> Generator[None, None, None]:
    """Inside, no Triton body runs: for comparisons to the bit."""
    with _lock:
        _plain[0] += 1
    try:
        yield
    finally:
        with _lock:
            _plain[0] -= 1


def runs_fused(tensor: torch.Tensor, check: Check) -> bool:
    """Whether the Triton body that `check` tries is taken for operands like this one."""
    return not _plain[0] and tensor.dtype in _HALVES and has_proved(check, tensor.device, tensor.dtype)


def has_proved(check: Check, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton body that `check` tries compiles here and is right; for those that give the same bits as plain
    torch, float32 too, and `plain_only` does not ask them to stand back."""
    return dtype in _TOLERANCE and is_nvidia(device) and has_triton() and _is_right(check, device, dtype)


def _is_right(check: Check, device: torch.device, dtype: torch.dtype) -> bool:
    """Found out in a thread of its own, since the first call may come from inside a checkpoint, an inference mode or a
    backward pass, whose hooks and modes are the thread's that asks."""
    key = (check, device, dtype)
    if key in _found:
        return _found[key]
    if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage]
        return False  # within a backward pass, which the comparison would wait for
    problem: list[str | None] = []
    thread = threading.Thread(target=lambda: problem.append(_problem(check, device, dtype)))
    thread.start()
    thread.join()
    _found[key] = problem == [None]
    if _found[key]:
        return True
    name = check.__module__.rpartition(".")[2]
    log_notice(f"the Triton kernel of {name} {problem[0] if problem else 'ended its thread'} on {device}: not used")
    return False


def _problem(check: Check, device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        for ours, plain in check(device, dtype):
            error = float((ours.float() - plain.float()).norm() / plain.float().norm())
            if not error < _TOLERANCE[dtype]:
                return f"is off by {error:.1%}"
    except Exception as error:  # whatever a compiler or driver says, plain torch is still there
        return f"does not run ({type(error).__name__}: {error})"
    return None
