"""Out-of-memory errors: recognized, cleaned up after, and explained."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

import torch

from lowrank.errors import ModelError, first_line

_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "cannot allocate memory")
"""Parts of the messages of torch's allocators on all devices, and of the libraries that it calls."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is out of memory. torch raises its own class on a GPU, a RuntimeError on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _MESSAGES)


def give_back_unused() -> None:
    """Free memory after a failed attempt: objects in reference cycles, and the allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif hasattr(torch, "xpu") and torch.xpu.is_available():
        torch.xpu.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def explain_out_of_memory(doing: str) -> Generator[None, None, None]:
    """Context that turns an out-of-memory error into a ModelError with ways out; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"out of memory while {doing}: {first_line(error)}\n"
            "  to need less memory set model.activation_checkpointing: full or sqrt, a smaller data.max_length, a "
            "smaller adapter.rank, fewer jobs at once, model.storage: nf4, or a smaller base\n"
            "  `lowrank plan CONFIG` shows what takes how much; resume=true continues from the last checkpoint"
        ) from None
