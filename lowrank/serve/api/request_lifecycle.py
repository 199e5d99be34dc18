"""One request while it is answered: its chunks as they come, until the end, the deadline, or the client's leaving."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from lowrank.generate.request import TokenChunk
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.engine import PendingAnswer
from lowrank.serve.limits import RequestLimits

_GONE = -1


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class ConcurrencyLimiter:
    """Refuses requests beyond `max_num_seqs + waiting` answers. Used from the event loop's thread only."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self.taken = 0
        self._usual = 1.0
        """Seconds that requests take, lately."""

    def acquire(self, count: int) -> None:
        """ApiError 429 if that is too much at the moment."""
        most = self.limits.max_num_seqs + self.limits.waiting
        if self.taken + count > most:
            retry = min(60, max(1, math.ceil(self._usual)))
            message = f"{self.taken} answers are in progress or wait, of {most} at the most; try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry)})
        self.taken += count

    def release(self, count: int, seconds: float) -> None:
        """They are over."""
        self.taken -= count
        self._usual += 0.1 * (seconds - self._usual)


class RequestLifecycle:
    """The answers to one request. `close` it whatever happens: what is not finished is cancelled."""

    def __init__(self, limits: RequestLimits, limiter: ConcurrencyLimiter, count: int) -> None:
        """ApiError 429 if `count` answers more are too many."""
        limiter.acquire(count)
        self.answers: list[PendingAnswer] = []
        self.started = time.monotonic()
        self.first_token: float | None = None
        """Seconds from the request to it."""
        self._limiter, self._count = limiter, count
        self._limit = limits.request_seconds
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[tuple[int, TokenChunk | None]] = asyncio.Queue()
        self._watcher: asyncio.Task[None] | None = None
        self._finished: set[int] = set()
        self.closed = False
        """Nobody waits any more."""

    def begin(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Listen to the `answers`, and to the client (`receive` is ASGI's, the body read)."""
        self._watcher = self._loop.create_task(self._watch(receive))
        for index, answer in enumerate(self.answers):
            answer.listen(lambda chunk, index=index: self._on_chunk(index, chunk))

    async def chunks(self) -> AsyncIterator[tuple[int, TokenChunk]]:
        """(number of the answer, chunk), until all are at their end. Raises ApiError, ClientGone."""
        while not self.complete:
            left = self.started + self._limit - time.monotonic()
            try:
                index, chunk = await asyncio.wait_for(self._chunks.get(), max(0.0, left))
            except asyncio.TimeoutError:
                raise ApiError(504, f"the answer took more than {self._limit:g} seconds", code="timeout") from None
            if chunk is None:
                raise ClientGone
            if chunk.finish is not None:
                self._finished.add(index)
            if chunk.finish == "cancelled":
                raise ApiError(503, "the server is stopping", code="cancelled")
            if chunk.finish == "error":
                message = chunk.error or "the answer failed"
                raise ApiError(400 if chunk.refused else 500, message, code="generation_failed")
            if self.first_token is None:
                self.first_token = time.monotonic() - self.started
            yield index, chunk

    @property
    def complete(self) -> bool:
        """All answers came to their end."""
        return len(self._finished) == len(self.answers)

    def close(self) -> float:
        """The seconds it took."""
        seconds = time.monotonic() - self.started
        if self.closed:
            return seconds
        self.closed = True
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None  # it holds us by the error that ends it: together they would wait for the collector
        for index, answer in enumerate(self.answers):
            if index not in self._finished:
                answer.cancel()
        self._limiter.release(self._count, seconds)
        return seconds

    def _on_chunk(self, index: int, chunk: TokenChunk) -> None:
        try:
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, (index, chunk))
        except RuntimeError:  # the loop was closed: nobody listens any more
            self.answers[index].cancel()

    async def _watch(self, receive: Callable[[], Awaitable[Any]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._chunks.put_nowait((_GONE, None))
