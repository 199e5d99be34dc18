"""Threads for whatever takes a while, so that the event loop has time for everybody.

Large requests share a thread of their own: however many come, they never stand before small ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
_LARGE = 64 << 10
"""Bytes of a request."""
_SMALL_AT_ONCE = 16
"""Some of them wait, for an adapter that is loaded or for the engine."""


class ThreadPools:
    """Two pools of threads: one for small requests, and one thread for all large ones."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(_SMALL_AT_ONCE, thread_name_prefix="lowrank-small")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="lowrank-large")

    async def run(self, size: int, function: Callable[..., Result], *args: object) -> Result:
        """`function(*args)`, for a request of `size` bytes."""
        pool = self._large if size > _LARGE else self._small
        return await asyncio.get_running_loop().run_in_executor(pool, function, *args)

    def close(self) -> None:
        """Stop both pools; work that was not begun is dropped."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)
