"""The GPU that is measured, or, in a rehearsal, the processor in its place."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Clock, memory and limits of a device; on a processor memory is not told (None)."""

    name: str

    @property
    def is_gpu(self) -> bool:
        return self.name.startswith("cuda")

    def wait(self) -> None:
        """Until it has done what it was told."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Median of one call, after one to warm up."""
        taken = []
        for _ in range(times + 1):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])

    def forget_peak(self) -> None:
        """Count the peak anew, from an empty cache."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes of tensors at their most, since `forget_peak`."""
        return torch.cuda.max_memory_allocated() if self.is_gpu else None

    def allocations(self) -> int:
        """How often torch has asked the driver for memory, which waits for the device."""
        return torch.cuda.memory_stats().get("num_device_alloc", 0) if self.is_gpu else 0

    @contextlib.contextmanager
    def with_memory(self, limit: int) -> Iterator[bool]:
        """As if the card had so many bytes; False where nothing can be capped, or the card has less."""
        if not self.is_gpu:
            yield False
            return
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        try:
            yield limit < total
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def ran_out(error: BaseException) -> bool:
    """Of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
