"""An answer on its way, as whoever asked sees it."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

from lowrank.generate.request import Answer, Piece
from lowrank.generate.sequence import Sequence


class Stepping(Protocol):
    """Who makes the steps (generator.py)."""

    @property
    def threaded(self) -> bool: ...

    def step(self) -> bool: ...

    def cancel(self, sequence: Sequence) -> None: ...


class Generation:
    """Iterate over its pieces, in a thread or with `async for`; or wait for the whole of it.

    Where the generator has no thread of its own, iterating makes the steps (for everybody).
    """

    def __init__(self, generator: Stepping, sequence: Sequence) -> None:
        self._generator = generator
        self._sequence = sequence

    def __iter__(self) -> Iterator[Piece]:
        heard: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._sequence.listen(heard.put)
        while True:
            while not self._generator.threaded and heard.empty():
                self._generator.step()
            piece = heard.get()
            yield piece
            if piece.finish is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Needs a generator that was started."""
        assert self._generator.threaded, "start() the generator first"
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[Piece] = asyncio.Queue()
        self._sequence.listen(lambda piece: self._hand_over(loop, heard.put_nowait, piece))
        while True:
            piece = await heard.get()
            yield piece
            if piece.finish is not None:
                return

    def listen(self, listener: Callable[[Piece], None]) -> None:
        """Call `listener` with every piece, from the thread that makes the steps."""
        self._sequence.listen(listener)

    def result(self) -> Answer:
        """Wait for its end."""
        for _ in self:
            pass
        return self._sequence.answer()

    def cancel(self) -> None:
        """Stop answering; what it holds is free before the next step. May be called at any time, from any thread."""
        self._generator.cancel(self._sequence)

    @property
    def answer(self) -> Answer:
        """What there is so far."""
        return self._sequence.answer()

    def _hand_over(self, loop: asyncio.AbstractEventLoop, put: Callable[[Piece], None], piece: Piece) -> None:
        try:
            loop.call_soon_threadsafe(put, piece)
        except RuntimeError:  # the loop was closed: nobody listens any more
            self._sequence.cancelled = True
