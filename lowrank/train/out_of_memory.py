"""What running out of memory looks like, and what to say about it."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

import torch

from lowrank.errors import ModelError, first_line

_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "cannot allocate memory")
"""By torch's allocators of all devices and systems, and by the libraries it calls."""


def is_out_of_memory(error: BaseException) -> bool:
    """torch tells it by a class on a GPU and by words on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _MESSAGES)


def give_back_unused() -> None:
    """After a failed attempt: what its frames held, and what the allocator keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif hasattr(torch, "xpu") and torch.xpu.is_available():
        torch.xpu.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def explain_out_of_memory(doing: str) -> Generator[None, None, None]:
    """Running out of memory in the block becomes a ModelError with the ways out; everything else passes."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"out of memory while {doing}: {first_line(error)}\n"
            "  what needs less: model.activation_checkpointing: full or sqrt, a smaller data.max_length, a smaller "
            "adapter.rank, "
            "fewer jobs at once, model.storage: nf4, a smaller base\n"
            "  `lowrank plan CONFIG` tells what takes how much; resume=true goes on from the last checkpoint"
        ) from None
