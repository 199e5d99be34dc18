"""One answer of vLLM, as its task goes on in the engine's event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from lowrank.generate.request import Answer, TokenChunk
from lowrank.generate.token_stream import Listener, TokenStream


class VllmAnswer:
    """`PendingAnswer` (engine.py) of one request to vLLM."""

    def __init__(self, loop: asyncio.AbstractEventLoop, prompt_tokens: int) -> None:
        self.stream = TokenStream()
        self.cached = 0
        self.over = threading.Event()
        self._loop, self._prompt_tokens = loop, prompt_tokens
        self._task: asyncio.Task[None] | None = None

    @property
    def answer(self) -> Answer:
        """The answer as far as it is generated."""
        return self.stream.answer(prompt_tokens=self._prompt_tokens, reused_tokens=self.cached)

    def listen(self, listener: Listener) -> None:
        """Every piece, those of the past first."""
        self.stream.listen(listener)

    def cancel(self) -> None:
        """vLLM aborts a request whose task is cancelled."""
        self._loop.call_soon_threadsafe(self._cancel)

    def begin(self, work: Coroutine[Any, Any, None], on_end: Callable[[], None]) -> None:
        """In the loop's thread, as all that follows."""
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(lambda task: self._finish(task, on_end))

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _finish(self, task: asyncio.Task[None], on_end: Callable[[], None]) -> None:
        error = None if task.cancelled() else task.exception()
        on_end()
        if not self.stream.finished and task.cancelled():
            self.stream.push(TokenChunk(None, finish="cancelled"))
        elif not self.stream.finished:
            reason = "it ended in the middle of an answer" if error is None else str(error)
            self.stream.push(TokenChunk(None, finish="error", error=f"vLLM: {reason}"))
        self.over.set()
