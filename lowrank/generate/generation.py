"""A submitted request, as its client sees it: its chunks as they come, the whole answer, and cancelling."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

from lowrank.generate.request import Answer, TokenChunk
from lowrank.generate.sequence import GenerationSequence


class GenerationDriver(Protocol):
    """What a `Generation` needs of its generator, which makes the steps (generator.py)."""

    @property
    def threaded(self) -> bool:
        """Whether a thread of the generator makes the steps; otherwise the waiting caller makes them."""
        ...

    def step(self) -> bool:
        """Compute the next token of every sequence; False if there is none."""
        ...

    def cancel(self, sequence: GenerationSequence) -> None:
        """Cancel a sequence; its pages are free before the next step."""
        ...


class Generation:
    """A request in progress. Iterate over its chunks, in a thread or with `async for`, or wait for the whole answer.

    Where the generator has no thread of its own, iterating makes the steps, for all requests.
    """

    def __init__(self, generator: GenerationDriver, sequence: GenerationSequence) -> None:
        self._generator = generator
        self._sequence = sequence

    def __iter__(self) -> Iterator[TokenChunk]:
        received: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()
        self._sequence.listen(received.put)
        while True:
            while not self._generator.threaded and received.empty():
                self._generator.step()
            chunk = received.get()
            yield chunk
            if chunk.finish is not None:
                return

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        """The same in an event loop; the generator must have been started."""
        assert self._generator.threaded, "start() the generator first"
        loop = asyncio.get_running_loop()
        received: asyncio.Queue[TokenChunk] = asyncio.Queue()
        self._sequence.listen(lambda chunk: self._hand_over(loop, received.put_nowait, chunk))
        while True:
            chunk = await received.get()
            yield chunk
            if chunk.finish is not None:
                return

    def listen(self, listener: Callable[[TokenChunk], None]) -> None:
        """Call `listener` with every chunk, from the thread that makes the steps."""
        self._sequence.listen(listener)

    def result(self) -> Answer:
        """The whole answer; waits for its end."""
        for _ in self:
            pass
        return self._sequence.answer()

    def cancel(self) -> None:
        """Stop answering; what it holds is free before the next step. May be called at any time, from any thread."""
        self._generator.cancel(self._sequence)

    @property
    def answer(self) -> Answer:
        """The answer as far as it is generated."""
        return self._sequence.answer()

    def _hand_over(self, loop: asyncio.AbstractEventLoop, put: Callable[[TokenChunk], None], chunk: TokenChunk) -> None:
        try:
            loop.call_soon_threadsafe(put, chunk)
        except RuntimeError:  # the loop was closed: nobody listens any more
            self._sequence.cancelled = True
